package sandbox

import "testing"

func TestATmpfsUnderAVolumeIsNotOurs(t *testing.T) {
	const text = `30 29 0:26 / /tmp rw,nosuid - tmpfs tmpfs rw
31 30 8:1 /data /tmp rw - ext4 /dev/sda1 rw
32 29 0:27 / /dev rw,nosuid shared:3 - tmpfs tmpfs rw,size=65536k
33 32 0:28 /part /dev/shm rw - tmpfs shm rw
34 29 0:29 / /proc rw - proc proc rw
`
	for target, want := range map[string]bool{"/tmp": false, "/dev": true, "/dev/shm": false, "/proc": false, "/none": false} {
		if got := onlyTmpfs(text, target); got != want {
			t.Errorf("%s: %v, want %v", target, got, want)
		}
	}
}
