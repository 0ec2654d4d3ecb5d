/* Files in states that a copy of the file system alone would lose. */
#include "matrix.h"
#include <sys/file.h>

static int fd;

static int flock_is_held(void)
{
	int other = open("locked", O_RDWR);

	return flock(other, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK;
}

static void flock_setup(void)
{
	fd = in_file("locked", "x");
	must(flock(fd, LOCK_EX), "flock");
}
static void flock_check(void) { expect(ask(flock_is_held), "flock is no longer held"); }
CARRIED(flock)

static int posix_lock_is_held(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_start = 10, .l_len = 5 };

	return fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_WRLCK && lock.l_pid == getppid();
}

static void posix_lock_setup(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_start = 10, .l_len = 5 };

	fd = in_file("locked", "0123456789abcdef");
	must(fcntl(fd, F_SETLK, &lock), "F_SETLK");
}
static void posix_lock_check(void) { expect(ask(posix_lock_is_held), "posix lock is no longer held by its process"); }
CARRIED(posix_lock)

static void deleted_setup(void)
{
	fd = in_file("gone", "still here");
	must(unlink("gone"), "unlink");
}

static void deleted_check(void)
{
	struct stat state;

	expect(fstat(fd, &state) == 0 && state.st_nlink == 0, "the file has come back");
	expect(holds(fd, "still here"), "content of a deleted open file");
}
CARRIED(deleted)

/* A deleted file that is mapped and bigger than CRIU's default limit for such files. */
static char *mapped;

static void deleted_mapped_setup(void)
{
	fd = in_file("big", "");
	must(ftruncate(fd, 8 << 20), "ftruncate");
	mapped = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(mapped == MAP_FAILED ? -1 : 0, "mmap");
	fill(mapped, 8 << 20, 21);
	must(unlink("big"), "unlink");
}
static void deleted_mapped_check(void) { expect(same(mapped, 8 << 20, 21), "content of a deleted mapped file"); }
CARRIED(deleted_mapped)

/* The open name is deleted, another name of the same file lives. */
static void hardlink_setup(void)
{
	fd = in_file("first", "two names");
	must(link("first", "second"), "link");
	must(unlink("first"), "unlink");
}

static void hardlink_check(void)
{
	int other = open("second", O_RDWR);

	expect(holds(fd, "two names") && holds(other, "two names"), "content of a file with a deleted name");
	expect(pwrite(fd, "TWO", 3, 0) == 3 && holds(other, "TWO names"), "descriptor and second name are one file");
	expect(pwrite(other, "two", 3, 0) == 3, "write through the second name");
	close(other);
}
CARRIED(hardlink)

static void deleted_cwd_setup(void)
{
	must(mkdir("lost", 0755), "mkdir");
	must(chdir("lost"), "chdir");
	must(rmdir("../lost"), "rmdir");
}

static void deleted_cwd_check(void)
{
	char path[256];
	struct stat state;

	expect(getcwd(path, sizeof path) == NULL && errno == ENOENT, "the deleted working directory has a name");
	expect(stat(".", &state) == 0 && S_ISDIR(state.st_mode), "the deleted working directory");
}
CARRIED(deleted_cwd)

static void append_setup(void)
{
	fd = must(open("log", O_WRONLY | O_CREAT | O_APPEND, 0644), "open");
}

/* A file that grows all the time: after a restore it must be as long as when the checkpoint was taken. */
static void append_check(void)
{
	struct stat state;

	expect(write(fd, "0123456789", 10) == 10, "append");
	expect(stat("log", &state) == 0, "stat");
	if (state.st_size != tick * 10)
		broken("the log has %ld bytes, expected %ld", (long)state.st_size, tick * 10);
}
CARRIED(append)

static void positions_setup(void)
{
	fd = in_file("read", "0123456789");
	must(lseek(fd, 4, SEEK_SET), "lseek");
	must(fcntl(fd, F_SETFL, O_NONBLOCK), "F_SETFL");
	must(fcntl(fd, F_SETFD, FD_CLOEXEC), "F_SETFD");
	must(dup2(fd, 200), "dup2");
}

static void positions_check(void)
{
	expect(lseek(fd, 0, SEEK_CUR) == 4, "the file's position");
	expect(fcntl(fd, F_GETFL) & O_NONBLOCK, "the file's flags");
	expect(fcntl(fd, F_GETFD) == FD_CLOEXEC && fcntl(200, F_GETFD) == 0, "the descriptors' flags");
	expect(lseek(200, 5, SEEK_SET) == 5 && lseek(fd, 0, SEEK_CUR) == 5 && lseek(fd, 4, SEEK_SET) == 4, "duplicates share a position");
}
CARRIED(positions)

static void tmpfs_write(const char *path, unsigned seed)
{
	static char content[1 << 18];
	int file = must(open(path, O_CREAT | O_WRONLY, 0640), path);

	fill(content, sizeof content, seed);
	must(write(file, content, sizeof content), "write");
	close(file);
}

static int tmpfs_same(const char *path, unsigned seed)
{
	static char content[1 << 18];
	struct stat state;
	int file = open(path, O_RDONLY);
	ssize_t n = read(file, content, sizeof content);

	fstat(file, &state);
	close(file);
	return n == sizeof content && same(content, sizeof content, seed) && (state.st_mode & 0777) == 0640;
}

static void tmpfs_setup(void)
{
	umask(0);
	must(mkdir("/tmp/matrix", 0755), "mkdir");
	tmpfs_write("/tmp/matrix/a", 31);
	tmpfs_write("/dev/shm/matrix", 32);
	must(symlink("a", "/tmp/matrix/link"), "symlink");
}

static void tmpfs_check(void)
{
	expect(tmpfs_same("/tmp/matrix/a", 31), "file in /tmp");
	expect(tmpfs_same("/tmp/matrix/link", 31), "symbolic link in /tmp");
	expect(tmpfs_same("/dev/shm/matrix", 32), "file in /dev/shm");
}
CARRIED(tmpfs)

/* CRIU 4.2 dumps this one and then cannot restore it. */
static void proc_self_setup(void) { fd = must(open("/proc/self", O_RDONLY | O_DIRECTORY), "open /proc/self"); }
static void proc_self_check(void) { expect(faccessat(fd, "stat", R_OK, 0) == 0, "/proc/self behind the descriptor"); }
REFUSED(proc_self)
