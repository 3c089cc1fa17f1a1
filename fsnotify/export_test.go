package fsnotify

import upstream "github.com/fsnotify/fsnotify"

// NewStrategyWith returns a strategy with a hub of its own that gets its watchers
// from open.
func NewStrategyWith(open func() (*upstream.Watcher, error)) *Strategy {
	return &Strategy{newHub(open)}
}

// Stall holds up the receiving of events until it is released.
func (s *Strategy) Stall() (release func()) {
	s.hub.mu.Lock()
	return s.hub.mu.Unlock
}

const (
	QuietTime = quietTime
	FileTick  = fileTick
	MaxSize   = maxSize
)

var Clean = clean
