//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package filelock

import (
	"os"
	"path/filepath"
	"syscall"
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

// A file without locks can be used all the same, but not one that is locked elsewhere: on
// an SMB share flock says EACCES for that.
func TestNoLocks(t *testing.T) {
	for _, err := range []error{syscall.ENOLCK, syscall.ENOSYS, syscall.EINVAL, syscall.EOPNOTSUPP, syscall.ENOTSUP} {
		if !noLocks(err) {
			t.Errorf("with %v the file cannot be used", err)
		}
	}
	for _, err := range []error{syscall.EACCES, syscall.EAGAIN, syscall.EWOULDBLOCK, syscall.EBADF, syscall.EIO, syscall.ESTALE, syscall.EPERM} {
		if noLocks(err) {
			t.Errorf("with %v the file can be used", err)
		}
	}
}

// Whatever else flock says, the file is not used: it may be locked.
func TestTryLockFails(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	if TryLock(file) {
		t.Error("a closed file can be locked")
	}
}
