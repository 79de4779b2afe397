/* corral-launch: the last steps before QEMU. It confines itself and becomes QEMU.
 *
 * usage: corral-launch OPTIONS -- QEMU ARGUMENTS
 *
 * Doing this between fork and exec of the daemon would copy the daemon's page tables and could deadlock on its locks;
 * a script would cost each start what its interpreter takes to come up. The arguments end with QEMU's, so whoever looks
 * for `-uuid ID` finds the machine at every moment. Options, as key=value:
 *
 *   uid=N            become this user and group (absent: stay who we are), with the groups of
 *   groups=N,N       (none by default)
 *   namespaces=1     mount, pid, IPC and UTS namespaces of its own (needs uid), with
 *   writable=DIR     (repeated) the rest of the file system becomes read-only
 *   device=PATH      (repeated) nothing else is in /dev
 *   join=FILE        (repeated) a control group's cgroup.procs
 *   report=FD        where QEMU's pid is written
 *   mortal=1         die when the parent dies
 *   spare=1          punch no holes, see spare_files()
 *
 * What fails is told on stderr, and the exit status is 126. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 126, FILES = 4096, MAX_GROUPS = 64, MAX_DEVICES = 16, LAST_CAPABILITY = 63 };

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#define RECURSIVE 0x8000 /* AT_RECURSIVE, MOUNT_ATTR_…: not in every C library's headers */
enum { READ_ONLY = 1, NO_SUID = 2 };

#if defined __x86_64__
#define ARCH AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCH AUDIT_ARCH_AARCH64
#elif defined __riscv && __riscv_xlen == 64
#define ARCH AUDIT_ARCH_RISCV64
#else
#error "spare_files() does not know this architecture"
#endif

static void fail(const char *format, ...)
{
	int why = errno;
	va_list arguments;
	fputs("corral-launch: ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	if (why)
		fprintf(stderr, ": %s", strerror(why));
	fputc('\n', stderr);
	_exit(FAILED);
}

static void wrong(const char *what)
{
	errno = 0;
	fail("%s", what);
}

static void check(int result, const char *what)
{
	if (result < 0)
		fail("%s", what);
}

/* ---- the options: argv up to "--" */

static char **options, **options_end;

/* The next value of `key` after *at, which begins as NULL. */
static const char *next_value(const char *key, char ***at)
{
	size_t length = strlen(key);
	for (char **option = *at ? *at + 1 : options; option < options_end; option++)
		if (!strncmp(*option, key, length) && (*option)[length] == '=') {
			*at = option;
			return *option + length + 1;
		}
	return NULL;
}

static const char *value(const char *key)
{
	char **at = NULL;
	return next_value(key, &at);
}

static unsigned number(const char *text)
{
	char *end;
	errno = 0;
	unsigned long found = strtoul(text, &end, 10);
	if (errno || end == text || *end || *text < '0' || *text > '9' || found > 0xfffffffe) {
		errno = EINVAL;
		fail("%s", text);
	}
	return (unsigned)found;
}

/* ---- the steps */

static void limit(void)
{
	struct rlimit none = {0, 0}, files;
	check(setrlimit(RLIMIT_CORE, &none), "limit of core files"); /* one would hold the guest's memory */
	check(getrlimit(RLIMIT_NOFILE, &files), "limit of files");
	if (files.rlim_max > FILES) /* unlimited is the largest number */
		files.rlim_max = FILES;
	files.rlim_cur = files.rlim_max;
	check(setrlimit(RLIMIT_NOFILE, &files), "limit of files");
}

/* Enter a control group: what comes after us stays in it. */
static void join(const char *file)
{
	char text[16];
	int length = snprintf(text, sizeof text, "%d", getpid());
	int fd = open(file, O_WRONLY | O_TRUNC | O_CLOEXEC);
	if (fd < 0 || write(fd, text, (size_t)length) != length)
		fail("enter %s", file);
	close(fd);
}

static void put_mount(const char *source, const char *target, const char *kind, unsigned long flags, const char *data)
{
	if (mount(source, target, kind, flags, data))
		fail("mount %s on %s", kind ? kind : source, target);
}

static void set_mount(const char *path, unsigned flags, uint64_t add, uint64_t remove)
{
	uint64_t attributes[4] = {add, remove, 0, 0};
	if (syscall(SYS_mount_setattr, AT_FDCWD, path, flags, attributes, sizeof attributes))
		fail("change mount %s", path);
}

/* Own mount, IPC and UTS namespaces: everything read-only but `writable`, and only `device` in /dev. */
static void separate(unsigned uid)
{
	const char *path;
	struct stat facts[MAX_DEVICES];
	size_t count = 0;
	check(unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS), "unshare");
	/* "Slave": what the host unmounts later goes away here too, so that no VM pins a disk of the host. */
	put_mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL);
	for (char **at = NULL; (path = next_value("device", &at)); count++) {
		if (count == MAX_DEVICES)
			wrong("too many devices");
		if (stat(path, &facts[count]))
			fail("%s", path);
	}
	for (char **at = NULL; (path = next_value("writable", &at));)
		put_mount(path, path, NULL, MS_BIND, NULL);
	set_mount("/", RECURSIVE, READ_ONLY | NO_SUID, 0);
	for (char **at = NULL; (path = next_value("writable", &at));)
		set_mount(path, 0, 0, READ_ONLY);
	put_mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k");
	count = 0;
	for (char **at = NULL; (path = next_value("device", &at)); count++)
		if (mknod(path, facts[count].st_mode, facts[count].st_rdev) || chown(path, uid, uid) || chmod(path, 0600))
			fail("%s", path);
	set_mount("/dev", 0, READ_ONLY, 0);
}

/* Go on as a new process, a child of our parent, in a session of its own; this process tells its pid and ends.
 * Only a new process can be the first of a pid namespace. CLONE_PARENT keeps the daemon the parent: it can wait for
 * QEMU, and no process stays between the two. */
static void own_process(int report, unsigned long namespace)
{
	long pid = syscall(SYS_clone, CLONE_PARENT | namespace | SIGCHLD, 0, 0, 0, 0);
	check((int)pid, "clone");
	if (pid) {
		char text[16];
		int length = snprintf(text, sizeof text, "%ld\n", pid);
		_exit(write(report, text, (size_t)length) == length ? 0 : FAILED);
	}
	setsid();
}

/* Drop to `uid` with no capability left and none to be had again. */
static void become(unsigned uid, const char *groups)
{
	gid_t list[MAX_GROUPS];
	size_t count = 0;
	char copy[16];
	for (int one = 0; one <= LAST_CAPABILITY; one++)
		prctl(PR_CAPBSET_DROP, one, 0, 0, 0); /* one that this kernel does not know is EINVAL: nothing to drop */
	while (groups && *groups) {
		size_t length = strcspn(groups, ",");
		if (count == MAX_GROUPS || length >= sizeof copy)
			wrong("too many groups");
		memcpy(copy, groups, length);
		copy[length] = 0;
		list[count++] = number(copy);
		groups += length + (groups[length] == ',');
	}
	check(setgroups(count, list), "groups");
	check(setresgid(uid, uid, uid), "group");
	check(setresuid(uid, uid, uid), "user");
}

/* Die with the daemon. After the change of user, which would undo it. */
static void be_mortal(int report)
{
	struct pollfd watch = {.fd = report};
	check(prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "parent death signal");
	if (poll(&watch, 1, 0)) /* nobody reads our report any more: the parent died before it could be noticed */
		wrong("the daemon is gone");
}

/* From now on fallocate(FALLOC_FL_PUNCH_HOLE) succeeds and does nothing.
 *
 * When a guest gives memory back (balloon, free page reporting), QEMU punches a hole into the file behind it and then
 * drops its own pages. A fork's file is its template's, whose seal refuses that, and QEMU would stop there. So it goes
 * on, and gives back what is its own. */
static void spare_files(void)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 0, 5),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fallocate, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])), /* low half: the mode */
		BPF_STMT(BPF_ALU | BPF_AND | BPF_K, FALLOC_FL_PUNCH_HOLE),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, FALLOC_FL_PUNCH_HOLE, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO), /* errno 0: success */
	};
	struct sock_fprog filter = {sizeof program / sizeof *program, program};
	check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0), "seccomp");
}

int main(int argc, char **argv)
{
	const char *file;
	options = options_end = argv + 1;
	while (options_end < argv + argc && strcmp(*options_end, "--"))
		options_end++;
	char **command = options_end + 1;
	if (command >= argv + argc || !value("report"))
		wrong("usage: corral-launch report=FD OPTIONS -- PROGRAM ARGUMENTS");
	int report = (int)number(value("report"));
	const char *user = value("uid");
	unsigned uid = user ? number(user) : 0;
	umask(077);
	limit();
	for (char **at = NULL; (file = next_value("join", &at));) /* before anything is allocated, so that all is charged */
		join(file);
	if (value("namespaces") && user) {
		separate(uid);
		own_process(report, CLONE_NEWPID);
		put_mount("proc", "/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
	} else {
		own_process(report, 0);
	}
	if (user)
		become(uid, value("groups"));
	if (value("mortal"))
		be_mortal(report);
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
	if (value("spare"))
		spare_files();
	close(report);
	execv(*command, command);
	fail("%s", *command);
}
