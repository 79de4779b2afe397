/* Starting a program: what the host asked for, the pipes or the terminal, and what the child does before it is one. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_STRINGS = 4096, FIRST = -15 };
static char strings[MAX_PAYLOAD], *args[MAX_STRINGS + 1], *envs[MAX_STRINGS + 1];

/* The child's last words: they go to the host as the reason. */
__attribute__((noreturn)) static void fail(int error_fd, int status, const char *what, const char *why)
{
	char text[512];
	int n = snprintf(text + 1, sizeof text - 1, "%.300s: %s", what, why);
	text[0] = (char)status;
	if (write(error_fd, text, 1 + (size_t)(n < (int)sizeof text - 1 ? n : (int)sizeof text - 2)) < 0)
		_exit(125);
	_exit(status);
}

void child_defaults(void)
{
	sigset_t none;
	sigemptyset(&none);
	for (int n = 1; n < NSIG; n++)
		signal(n, SIG_DFL);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* The scheduling policy is reset by the kernel (SCHED_RESET_ON_FORK), memory locks are not inherited. */
	int fd = pretend ? -1 : open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, "0", 1); /* else it is spared by the OOM killer for longer: no reason not to run it */
		close(fd);
	}
	umask(022);
}

/* In a guest that has just woken, the program that somebody waits for goes before what else woke up. What it starts in
 * turn is like anybody (the kernel sees to that), and so is itself after program_ordinary(). */
static void go_first(pid_t pid)
{
	struct sched_param none = {0};
	if (!syscall(SYS_sched_setscheduler, pid, SCHED_OTHER | SCHED_RESET_ON_FORK, &none))
		setpriority(PRIO_PROCESS, (id_t)pid, FIRST);
}

void program_ordinary(pid_t pid)
{
	struct sched_param none = {0};
	if (syscall(SYS_sched_getscheduler, pid) != (SCHED_OTHER | SCHED_RESET_ON_FORK))
		return; /* it has chosen something of its own */
	setpriority(PRIO_PROCESS, (id_t)pid, getpriority(PRIO_PROCESS, (id_t)pid) - FIRST);
	syscall(SYS_sched_setscheduler, pid, SCHED_OTHER, &none);
}

static void become(const struct program *p, int error_fd, int terminal)
{
	const char *name = p->user;
	char *end;
	unsigned long number = strtoul(name, &end, 10);
	struct passwd *user = name[0] ? getpwnam(name) : getpwuid(geteuid());
	if (!user && !*end && name[0] >= '0' && name[0] <= '9')
		user = getpwuid((uid_t)number);
	struct passwd self = {.pw_name = geteuid() ? "?" : "root", .pw_uid = geteuid(), .pw_gid = getegid(),
	                      .pw_dir = geteuid() || access("/root", X_OK) ? "/" : "/root", .pw_shell = "/bin/sh"};
	if (!user && (!name[0] || !strcmp(name, self.pw_name)))
		user = &self; /* a micro guest may have no /etc/passwd */
	if (!user)
		fail(error_fd, 126, name, "no such user");
	clearenv();
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", user->pw_dir, 1);
	setenv("USER", user->pw_name, 1);
	setenv("LOGNAME", user->pw_name, 1);
	setenv("SHELL", user->pw_shell[0] ? user->pw_shell : "/bin/sh", 1);
	if (terminal)
		setenv("TERM", "xterm-256color", 1);
	for (char **e = envs; *e; e++)
		putenv(*e);
	if (user->pw_uid != geteuid()) {
		if (terminal && fchown(0, user->pw_uid, (gid_t)-1))
			fail(error_fd, 126, "terminal", strerror(errno));
		if (initgroups(user->pw_name, user->pw_gid) || setgid(user->pw_gid) || setuid(user->pw_uid))
			fail(error_fd, 126, name, strerror(errno));
	}
	if (p->cwd[0] ? chdir(p->cwd) : chdir(user->pw_dir) && chdir("/"))
		fail(error_fd, 126, p->cwd, strerror(errno));
}

__attribute__((noreturn)) static void run_child(const struct program *p, const int fds[3], int error_fd, bool joined)
{
	child_defaults();
	setsid();
	if (p->limit && !joined && !limit_join(p->limit))
		fail(error_fd, 126, "limit of processes", strerror(errno));
	if (p->tty && ioctl(fds[0], TIOCSCTTY, 0))
		fail(error_fd, 126, "terminal", strerror(errno));
	for (int i = 0; i < 3; i++)
		if (dup2(fds[i], i) < 0)
			fail(error_fd, 126, "stdio", strerror(errno));
	become(p, error_fd, p->tty);
	execvp(args[0], args);
	fail(error_fd, errno == ENOENT ? 127 : 126, args[0], errno == ENOENT ? "not found" : strerror(errno));
}

/* The payload of an exec as strings; NULL or what is wrong with it. */
const char *program_parse(struct frame *f, struct program *p)
{
	struct fields fields = {f->payload, f->payload + f->length};
	struct field_view v;
	size_t used = 0, nargs = 0, nenvs = 0;
	int more;
	*p = (struct program){.cwd = "", .user = ""};
	while ((more = next_field(&fields, &v)) == 1) {
		if (v.tag == F_TTY) {
			if (v.length != 4)
				return "bad terminal size";
			p->tty = true;
			p->size.ws_row = (unsigned short)(v.data[0] | v.data[1] << 8);
			p->size.ws_col = (unsigned short)(v.data[2] | v.data[3] << 8);
			continue;
		}
		if (v.tag == F_PROCESSES) {
			if (v.length != 4 || !(p->processes = get32(v.data)))
				return "bad limit of processes";
			continue;
		}
		/* Fits always: five bytes of field header make room for the terminating one. */
		char *s = memcpy(strings + used, v.data, v.length);
		s[v.length] = 0;
		used += v.length + 1;
		if (memchr(s, 0, v.length))
			return "a string has a NUL in it";
		if (v.tag == F_ARG && nargs < MAX_STRINGS)
			args[nargs++] = s;
		else if (v.tag == F_ENV && nenvs < MAX_STRINGS && strchr(s, '=') > s)
			envs[nenvs++] = s;
		else if (v.tag == F_CWD)
			p->cwd = s;
		else if (v.tag == F_USER)
			p->user = s;
		else
			return "too many or unknown fields";
	}
	args[nargs] = envs[nenvs] = NULL;
	return more < 0 ? "malformed fields" : nargs ? NULL : "no program";
}

static int open_terminal(int fd[ENDS], const struct program *p, int child[3])
{
	int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (master < 0)
		return -1;
	fd[STDOUT] = master;
	char *name = grantpt(master) || unlockpt(master) ? NULL : ptsname(master);
	if (!name || (child[0] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		return -1;
	if ((fd[STDIN] = fcntl(master, F_DUPFD_CLOEXEC, 0)) < 0)
		return -1;
	child[1] = child[2] = child[0];
	return ioctl(master, TIOCSWINSZ, &p->size);
}

static int open_pipes(int fd[ENDS], int child[3])
{
	for (int i = 0, p[2]; i < 3; i++) {
		if (pipe2(p, O_CLOEXEC))
			return -1;
		child[i] = p[i ? 1 : 0];
		fd[i == 0 ? STDIN : i == 1 ? STDOUT : STDERR] = p[i ? 0 : 1];
	}
	return 0;
}

pid_t program_start(const struct program *p, int fd[ENDS])
{
	int child[3] = {-1, -1, -1}, error[2] = {-1, -1};
	pid_t pid = -1;
	bool joined = false;
	if (!(p->tty ? open_terminal(fd, p, child) : open_pipes(fd, child)) && !pipe2(error, O_CLOEXEC)) {
		pid = p->limit ? limit_fork(p->limit) : -1;
		joined = pid >= 0;
		pid = joined ? pid : fork();
	}
	if (pid == 0)
		run_child(p, child, error[1], joined);
	if (pid > 0 && p->first)
		go_first(pid);
	int why = errno;
	fd[ERR_PIPE] = error[0];
	if (error[1] >= 0)
		close(error[1]);
	for (int i = 0; i < (p->tty ? 1 : 3); i++)
		if (child[i] >= 0)
			close(child[i]);
	for (int i = 0; i < ENDS; i++)
		if (fd[i] >= 0)
			fcntl(fd[i], F_SETFL, fcntl(fd[i], F_GETFL) | O_NONBLOCK);
	errno = why;
	return pid;
}
