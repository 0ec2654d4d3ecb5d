/*
 * hold MODE PATH: takes hold of PATH in the way MODE names, says "ready", and
 * after SIGUSR1 says whether the hold is still what it was: "kept" or "lost".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <unistd.h>

static int fd;
static const char *path;

static void die(const char *what) { perror(what); exit(1); }

static int create(const char *name) {
	int f = open(name, O_RDWR | O_CREAT, 0600);
	if (f < 0) die(name);
	return f;
}

static void touch_inside(void) {
	char name[4096];
	snprintf(name, sizeof name, "%s/new", path);
	close(create(name));
}

/* lock tries to lock the whole file through a second descriptor. */
static int lock(int command) {
	struct flock whole = {.l_type = F_WRLCK};
	return fcntl(create(path), command, &whole);
}

static int has_event(void) {
	char events[4096];
	return read(fd, events, sizeof events) > 0;
}

static void hold_inotify(void) {
	fd = inotify_init1(IN_NONBLOCK);
	if (inotify_add_watch(fd, path, IN_CREATE) < 0) die("inotify_add_watch");
}
static void hold_fanotify(void) {
	fd = fanotify_init(FAN_NONBLOCK, O_RDONLY);
	if (fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN | FAN_EVENT_ON_CHILD, AT_FDCWD, path)) die("fanotify_mark");
}
static int kept_notify(void) { touch_inside(); return has_event(); }

static void hold_flock(void) { if (flock(fd = create(path), LOCK_EX)) die("flock"); }
static int kept_flock(void) { return flock(create(path), LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK; }

static void hold_posix(void) {
	struct flock whole = {.l_type = F_WRLCK};
	if (fcntl(fd = create(path), F_SETLK, &whole)) die("F_SETLK");
}
static int kept_posix(void) {
	struct flock whole = {.l_type = F_WRLCK};
	/* Another process must be refused; ask through its eyes. */
	int answer[2];
	if (pipe(answer)) die("pipe");
	if (fork() == 0) {
		char c = fcntl(fd, F_GETLK, &whole) == 0 && whole.l_type != F_UNLCK;
		_exit(write(answer[1], &c, 1) != 1);
	}
	char c = 0;
	return read(answer[0], &c, 1) == 1 && c;
}

static void hold_ofd(void) {
	struct flock whole = {.l_type = F_WRLCK};
	if (fcntl(fd = create(path), F_OFD_SETLK, &whole)) die("F_OFD_SETLK");
}
static int kept_ofd(void) { return lock(F_OFD_SETLK) != 0; }

static void hold_lease(void) {
	fd = open(path, O_RDONLY | O_CREAT, 0600);
	if (fcntl(fd, F_SETLEASE, F_RDLCK)) die("F_SETLEASE");
}
static int kept_lease(void) { return fcntl(fd, F_GETLEASE) == F_RDLCK; }

static void write_text(void) {
	if (ftruncate(fd = create(path), 0) || write(fd, "text", 4) != 4) die("write");
}
static int kept_text(void) {
	char text[5] = "";
	return pread(fd, text, 5, 0) == 4 && !strcmp(text, "text");
}
static void hold_deleted(void) { write_text(); unlink(path); }
static void hold_renamed_link(void) {
	char other[4096];
	snprintf(other, sizeof other, "%s.other", path);
	write_text();
	if (link(path, other)) die("link");
	unlink(path);
}

static const struct { const char *mode; void (*hold)(void); int (*kept)(void); } modes[] = {
	{"inotify", hold_inotify, kept_notify}, {"fanotify", hold_fanotify, kept_notify},
	{"flock", hold_flock, kept_flock}, {"posix", hold_posix, kept_posix},
	{"ofd", hold_ofd, kept_ofd}, {"lease", hold_lease, kept_lease},
	{"deleted", hold_deleted, kept_text}, {"unlinked", hold_renamed_link, kept_text},
};

int main(int argc, char **argv) {
	if (argc != 3) return 2;
	path = argv[2];
	setvbuf(stdout, NULL, _IONBF, 0);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		if (strcmp(argv[1], modes[i].mode)) continue;
		modes[i].hold();
		puts("ready");
		int got;
		sigwait(&set, &got);
		puts(modes[i].kept() ? "kept" : "lost");
		return 0;
	}
	return 2;
}
