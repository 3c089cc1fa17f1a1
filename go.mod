module github.com/infobloxopen/hotload

go 1.25.0

require (
	github.com/fsnotify/fsnotify v1.10.1
	github.com/lib/pq v1.12.3
)

require golang.org/x/sys v0.13.0 // indirect
