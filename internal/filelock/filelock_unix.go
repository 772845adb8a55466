//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package filelock

import (
	"errors"
	"os"
	"syscall"
)

func tryLock(file *os.File) bool {
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err != syscall.EINTR {
			return err == nil || noLocks(err)
		}
	}
}

// noLocks reports whether the error of flock says that there are no locks. ErrUnsupported
// is ENOSYS, ENOTSUP and EOPNOTSUPP.
func noLocks(err error) bool {
	return err == syscall.ENOLCK || err == syscall.EINVAL || errors.Is(err, errors.ErrUnsupported)
}
