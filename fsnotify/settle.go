package fsnotify

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"syscall"
	"time"
)

// Hints say why a file is read. They decide when a reading is acted upon, never
// what it is.
const (
	announced uint32 = 1 << iota // by an event
	written                      // the event: its content was changed in place
	renamed                      // the event: it, or a link to it, was put in place by rename
	asked                        // for a new watch, or because its way has just been followed
)

// A settling decides when a reading is acted upon: a value is delivered, an
// error is logged or returned by Watch.
//
//	a reading that is                                          is acted upon
//
//	the same as the last one acted upon, and as all since      at once: nothing is new
//	good, put in place by rename, no write announced since     at once
//	good, no good one acted upon before, no write announced,   at once
//	  and modified over a minute ago
//	the same for 25 ms, no write announced meanwhile; if       then
//	  no good, none since was good, and it is no passing error
//	good, otherwise                                            a second after readings began to
//	                                                             differ from the last acted upon
//	no good, otherwise                                         a second after that, and after
//	                                                             the last good one
//
// If it is not acted upon, the file is read again.
//
// Only the third row looks at a file's times. They tick in whole seconds on some
// file systems, come from another clock on others, and anybody can set them.
type settling struct {
	acted   reading   // the last reading acted upon; none at first
	had     bool      // one of them was good
	last    reading   // the last reading not acted upon; none after one that was
	since   time.Time // when readings began to differ from acted; zero if they do not
	bad     time.Time // when the last good reading since then was; since if there was none
	quiet   time.Time // since when last is as it is, and no write was announced
	renamed bool      // put in place by rename, and no write was announced since
}

// decide reports whether r, read between begun and ended, is acted upon, and if
// not in how long the file is to be read again. The hints came after the reading before
// was begun.
func (s *settling) decide(r reading, hints uint32, begun, ended time.Time) (act bool, again time.Duration) {
	good := r.err == nil
	nothingNew := r.same(s.acted) && s.since.IsZero()
	steady := r.same(s.last) && hints&written == 0 && !r.passing && (good || s.bad.Equal(s.since))
	// A write and a rename at once: in which order is not known.
	s.renamed = (s.renamed || hints&renamed != 0) && hints&written == 0
	if s.since.IsZero() {
		s.since, s.bad = begun, begun
	}
	limit := s.bad.Add(maxWait)
	if good {
		limit, s.bad = s.since.Add(maxWait), ended
	}
	switch {
	case nothingNew:
	case good && s.renamed:
	case good && !s.had && hints&written == 0 && begun.Sub(r.info.ModTime()) > longAgo:
	case steady && begun.Sub(s.quiet) >= quietTime:
	case !begun.Before(limit):
	default:
		if !steady {
			s.last, s.quiet = r, ended
		}
		again = s.quiet.Add(quietTime).Sub(ended)
		if r.passing {
			again = max(ended.Sub(s.since), time.Millisecond)
		}
		return false, min(again, limit.Sub(ended))
	}
	*s = settling{acted: r, had: s.had || good}
	return true, 0
}

// A reading is what a file was found to be.
type reading struct {
	value   string // "" if err is set
	err     error
	passing bool        // err says nothing of the file, and no event will say that it has passed
	info    fs.FileInfo // of what was opened, when it had been read; nil if that failed
}

func (r reading) same(s reading) bool {
	return r.value == s.value && fmt.Sprint(r.err) == fmt.Sprint(s.err)
}

func read(path string) (r reading) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not hold it up
	if err == nil {
		defer f.Close()
		r.info, err = f.Stat()
	}
	var content []byte
	if err == nil && r.info.Mode().IsRegular() && r.info.Size() <= maxSize {
		if content, err = io.ReadAll(io.LimitReader(f, maxSize+1)); err == nil {
			r.info, err = f.Stat() // what was written meanwhile is not old
		}
	}
	switch {
	case err != nil:
		r.passing = !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission)
		r.err = fmt.Errorf("hotload: fsnotify: %w", err)
		return r
	case r.info.IsDir():
		err = errors.New("is a directory, want a regular file")
	case !r.info.Mode().IsRegular():
		err = fmt.Errorf("has mode %v, want a regular file", r.info.Mode())
	case r.info.Size() > maxSize || len(content) > maxSize:
		err = fmt.Errorf("is larger than %d bytes, want a connection string", maxSize)
	default:
		r.value, err = clean(content)
	}
	if err != nil {
		r.err = fmt.Errorf("hotload: fsnotify: %s %w", path, err)
	}
	return r
}

// clean returns the value in a file's content. Its errors hold nothing of it.
func clean(content []byte) (string, error) {
	mark := []byte("\ufeff")
	value := bytes.TrimSpace(bytes.TrimPrefix(content, mark))
	switch {
	case bytes.HasPrefix(content, []byte("\xff\xfe")), bytes.HasPrefix(content, []byte("\xfe\xff")):
		return "", errors.New("begins with the mark of UTF-16 or UTF-32, want a connection string in UTF-8")
	case bytes.IndexByte(content, 0) >= 0:
		return "", errors.New("holds a NUL byte, as text in UTF-16 or UTF-32 does, want a connection string in UTF-8")
	case bytes.HasPrefix(value, mark):
		return "", errors.New("begins with two byte order marks of UTF-8, want one or none")
	case len(value) == 0:
		return "", errors.New("is empty or blank, want a connection string")
	}
	return string(value), nil
}

// replaced reports whether a single file that is mounted was replaced where it is
// mounted from: its path leads to it, then as now, though it has no link any more. That is
// so for an instant of each rename, and therefore must be so for a quiet time.
func replaced(then, now fs.FileInfo, apart time.Duration) bool {
	return now != nil && sameFile(then, now) && unlinked(then) && unlinked(now) && apart >= quietTime
}

// unlinked reports whether a file is known to have no link. On Windows it is not.
func unlinked(info fs.FileInfo) bool {
	n := reflect.Indirect(reflect.ValueOf(info.Sys())).FieldByName("Nlink") // its type differs between systems
	return n.CanUint() && n.Uint() == 0
}

func sameFile(a, b fs.FileInfo) bool {
	return a == nil && b == nil || a != nil && b != nil && os.SameFile(a, b)
}

func unchanged(a, b fs.FileInfo) bool {
	return sameFile(a, b) && (a == nil || a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && unlinked(a) == unlinked(b))
}

// rests reports whether a file that nothing was announced of need not be read, but only
// looked at: its last reading was good, and what was written since would have left
// another modification time. What leaves none (a memory map on some file systems, a time
// that is set back) is found after maxRest.
func (f *file) rests(now time.Time) bool {
	if !f.since.IsZero() || f.acted.err != nil || f.began.Sub(f.seen) < fileTick || now.Sub(f.began) >= maxRest {
		return false
	}
	info, err := os.Stat(f.path)
	return err == nil && unchanged(f.info, info)
}
