/* How many processes a program may have: a control group (version 2) for each that is limited. A fork beyond it fails in
 * the guest as it does for any user who has too many. systemd has mounted the tree and turned the controller on; where
 * nobody has (micro), we do. A group can go only when nobody is in it: what a program left running keeps its own. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PREFIX "corral-run-"
#define INTO_CGROUP 0x200000000ULL
static const char *const SYSTEM = "/sys/fs/cgroup", *const OWN = "/run/corral/cgroup";

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	int why = errno;
	if (fd >= 0)
		close(fd);
	errno = why;
	return done;
}

static bool is_tree(const char *root)
{
	char path[128];
	snprintf(path, sizeof path, "%s/cgroup.subtree_control", root);
	return access(path, W_OK) == 0;
}

/* Where version 2 is mounted; NULL where it cannot be had. */
static const char *tree(void)
{
	static const char *found;
	if (!found && is_tree(SYSTEM))
		found = SYSTEM;
	if (!found) {
		mkdir("/run/corral", 0755);
		mkdir(OWN, 0755);
		if (is_tree(OWN) || !mount("cgroup2", OWN, "cgroup2", 0, ""))
			found = OWN;
	}
	return found;
}

static char *file_of(uint32_t id, const char *name)
{
	static char path[160];
	snprintf(path, sizeof path, "%s/" PREFIX "%u%s%s", tree(), id, *name ? "/" : "", name);
	return path;
}

/* Groups whose last process has gone since. Not those of open channels: a child may be about to join its group. */
static void sweep(const char *root)
{
	DIR *directory = opendir(root);
	for (struct dirent *e; directory && (e = readdir(directory));) {
		uint32_t id = strncmp(e->d_name, PREFIX, strlen(PREFIX)) ? 0 : (uint32_t)strtoul(e->d_name + strlen(PREFIX), NULL, 10);
		if (id && !channel_open(id))
			limit_drop(id);
	}
	if (directory)
		closedir(directory);
}

const char *limit_make(uint32_t id, uint32_t processes)
{
	char path[128], number[16], on[256];
	const char *root = pretend ? NULL : tree();
	if (!root)
		return "processes cannot be limited: this guest has no control groups (version 2)";
	sweep(root);
	snprintf(path, sizeof path, "%s/cgroup.subtree_control", root);
	if (!(read_small(path, on, sizeof on) && strstr(on, "pids")) && !put(path, "+pids"))
		return "processes cannot be limited: this guest has no controller for them";
	if (mkdir(file_of(id, ""), 0755) && errno != EEXIST)
		return "processes cannot be limited: no control group can be made";
	snprintf(number, sizeof number, "%u", processes);
	if (put(file_of(id, "pids.max"), number))
		return NULL;
	limit_drop(id);
	return "processes cannot be limited: the control group does not take a limit";
}

/* A child that is born in the group; -1: not with this kernel. To move one there waits until the kernel has seen that
 * nobody forks (an RCU grace period): in a fork that has just woken, for all others that woke. */
pid_t limit_fork(uint32_t id)
{
	int fd = open(file_of(id, ""), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	uint64_t arguments[11] = {[0] = INTO_CGROUP, [4] = SIGCHLD, [10] = (uint64_t)fd}; /* struct clone_args */
	long pid = fd < 0 ? -1 : syscall(SYS_clone3, arguments, sizeof arguments);
	if (pid && fd >= 0)
		close(fd);
	return (pid_t)pid;
}

bool limit_join(uint32_t id)
{
	return put(file_of(id, "cgroup.procs"), "0");
}

bool limit_reached(uint32_t id)
{
	char text[256], *count;
	return read_small(file_of(id, "pids.events"), text, sizeof text) && (count = strstr(text, "max ")) && atol(count + 4);
}

void limit_kill(uint32_t id)
{
	put(file_of(id, "cgroup.kill"), "1"); /* kernels before 5.14 have no such file: the process group dies all the same */
}

void limit_drop(uint32_t id)
{
	rmdir(file_of(id, ""));
}
