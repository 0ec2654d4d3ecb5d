/* matrix: one small program per kernel feature that a checkpoint must carry.
 *
 *   matrix NAME DIR [ARG]     sets the feature up, prints "ready", then checks its own state every 50 ms and prints "ok N"
 *   matrix list               prints every row: NAME, "carried" or "refused", and the capabilities it needs
 *
 * A state that did not survive prints "BROKEN: what" and ends with status 1. A kernel that cannot make the feature at
 * all prints "unavailable: why" and ends with status 77. DIR is a fresh directory the row may use; ARG belongs to the row.
 *
 * Each row is registered by ROW in the file of its theme. */
#ifndef MATRIX_H
#define MATRIX_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct row {
	const char *name;
	const char *fate;      /* "carried": must survive; "refused": must be named before the freeze */
	const char *caps;      /* capabilities beyond a container's default ones, separated by commas */
	void (*setup)(void);
	int lossy;             /* what it has queued in the kernel may be lost: a check that fails is made once more */
	void (*check)(void);   /* called every 50 ms; calls broken() when the state is wrong */
	struct row *next;
};

extern struct row *rows;
extern const char *row_arg;    /* third argument, or NULL */
extern long tick;              /* number of the present check, from 1 */

#define ROW(id, fate_, caps_) ROW_OF(id, fate_, caps_, 0)
#define ROW_OF(id, fate_, caps_, lossy_)                                                       \
	static struct row row_##id = { #id, fate_, caps_, id##_setup, lossy_, id##_check, NULL }; \
	__attribute__((constructor)) static void add_##id(void) { row_##id.next = rows; rows = &row_##id; }
#define CARRIED(id) ROW(id, "carried", "")
/* LOSSY is CARRIED but for what was not read yet when a checkpoint comes: a restore does not bring it back. */
#define LOSSY(id, caps_) ROW_OF(id, "carried", caps_, 1)
#define REFUSED(id) ROW(id, "refused", "")

/* broken reports lost state and ends the program, or has a lossy row checked again. */
void broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/* unavailable reports a kernel or a sandbox that cannot make the feature. */
void unavailable(const char *what) __attribute__((noreturn));
/* must ends the program when a set-up call failed (result < 0). */
long must(long result, const char *what);
/* expect reports lost state when the condition does not hold, with errno's text. */
void expect(int condition, const char *what);

/* fill writes a pattern that seed determines; same tells whether it is still there. */
void fill(void *memory, size_t size, unsigned seed);
int same(const void *memory, size_t size, unsigned seed);

/* child forks a process that pauses for ever, or runs body when given, and dies with its parent. */
pid_t child(void (*body)(void));
/* ask makes a forked child run test and returns whether it was true: for what another process must see. */
int ask(int (*test)(void));
/* readable waits up to 5 s for fd to be readable. */
int readable(int fd);
/* in_file writes text to a new file of DIR and returns its open descriptor. */
int in_file(const char *name, const char *text);
/* holds tells whether fd's file consists of exactly text. */
int holds(int fd, const char *text);

#endif
