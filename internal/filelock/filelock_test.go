//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package filelock

import (
	"os"
	"path/filepath"
	"testing"
)

// A file has one lock, whatever name it is opened by, until it is closed.
func TestTryLock(t *testing.T) {
	dir := t.TempDir()
	open := func(name string) *os.File {
		t.Helper()
		file, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		return file
	}
	first := open("file")
	if err := os.Symlink("file", filepath.Join(dir, "symbolic link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "hard link")); err != nil {
		t.Fatal(err)
	}
	if !TryLock(first) {
		t.Fatal("the file cannot be locked")
	}
	names := []string{"file", "symbolic link", "hard link"}
	for _, name := range names {
		if TryLock(open(name)) {
			t.Errorf("the file was locked again as %s", name)
		}
	}
	if !TryLock(open("other file")) {
		t.Error("another file cannot be locked")
	}
	first.Close()
	for _, name := range names {
		file := open(name)
		if !TryLock(file) {
			t.Errorf("the file cannot be locked as %s after it was closed", name)
		}
		file.Close()
	}
}

// A file without locks can be used all the same. A closed file stands for one on
// a file system that has none: the system call fails, but not because of a lock.
func TestTryLockWithoutLocks(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	if !TryLock(file) {
		t.Error("a file without locks cannot be used")
	}
}
