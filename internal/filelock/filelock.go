// Package filelock locks open files, so that two processes do not use the same
// one. The locks are advisory: a process that does not ask for the lock is not
// hindered.
package filelock

import "os"

// TryLock takes an exclusive lock on the file without waiting for it. It returns
// false if the same file, by this name or any other, is open and locked elsewhere,
// in this process or another, or if the system refuses the lock for another reason.
// The lock lasts until the file is closed, at the latest by the end of the process.
// Only where the system or the file system says that it has no such locks, TryLock
// returns true without one.
func TryLock(file *os.File) bool {
	return tryLock(file)
}
