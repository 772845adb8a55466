//go:build !darwin && !dragonfly && !freebsd && !illumos && !linux && !netbsd && !openbsd

package filelock

import "os"

func tryLock(*os.File) bool { return true }
