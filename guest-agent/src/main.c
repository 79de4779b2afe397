/* corral-guest: the port, the event loop, and the session with the host. agent.h says how the parts fit.
 *
 * usage: corral-guest [--port PATH | --socket-fd N] [--pretend]
 *
 * A session begins with HELLO (a nonce of the host's) and ends with the next HELLO, with garbage, or when the host
 * goes away; its programs are killed then. The agent announces itself whenever a host may be listening, so that nobody
 * needs to poll a booting guest. It is not process 1 and reaps only what it started. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "org.corral.guest.0"
enum { TICK_MS = 500, MAX_ECHO = 64, PRIORITY = 50, FLUSH_MS = 5000, AWAKE_MS = 1000 };

bool pretend;
static int port = -1, signals = -1;
static bool is_socket, connected, session, hunting;
static uint8_t nonce[NONCE_SIZE], instance[NONCE_SIZE];
static enum { STAY, POWER_OFF, REBOOT } going;
static int64_t going_since, flush_at; /* flush_at: 0 where there is nothing to be flushed */
int64_t awake_at;

int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void end_session(void)
{
	channels_kill_all();
	session = false;
}

void violation(const char *why)
{
	end_session();
	hunting = true;
	out_frame(0, T_VIOLATION, why, strlen(why));
}

/* ---- frames */

static void hello(struct frame *f)
{
	uint8_t reply[2 * NONCE_SIZE + 2] = {0};
	if (f->length < NONCE_SIZE)
		return;
	if (!session || memcmp(nonce, f->payload, NONCE_SIZE)) {
		end_session();
		out_clear(); /* what an earlier host was to get; MARK tells this one where to begin */
		memcpy(nonce, f->payload, NONCE_SIZE);
		session = true;
	}
	memcpy(reply, nonce, NONCE_SIZE);
	memcpy(reply + NONCE_SIZE, instance, NONCE_SIZE);
	reply[2 * NONCE_SIZE] = PROTOCOL;
	out_mark();
	out_frame(0, T_WELCOME, reply, sizeof reply);
}

static void announce(void)
{
	out_mark();
	out_frame(0, T_ANNOUNCE, instance, sizeof instance);
}

static void identity(struct frame *f)
{
	static struct text failures;
	failures.length = 0;
	if (!pretend)
		awake_at = now_ms() + AWAKE_MS;
	if (pretend)
		add_words(&failures, "only pretending");
	else if (identity_apply((struct fields){f->payload, f->payload + f->length}, &failures))
		flush_at = now_ms() + FLUSH_MS;
	out_frame(f->channel, failures.length ? T_REFUSED : T_REPLY, failures.data, failures.length);
}

static void shut_down(struct frame *f)
{
	bool reboot = f->length && f->payload[0];
	if (pretend) {
		out_frame(f->channel, T_REFUSED, "only pretending", 15);
		return;
	}
	if (!machine_shutdown(reboot)) {
		going = reboot ? REBOOT : POWER_OFF;
		going_since = now_ms();
	}
	out_frame(f->channel, T_REPLY, NULL, 0);
}

static void handle(struct frame *f)
{
	static struct text info;
	if (f->type == T_HELLO) {
		hello(f);
		return;
	}
	if (!session)
		return;
	switch (f->type) {
	case T_PING:
		out_frame(f->channel, T_REPLY, f->payload, f->length < MAX_ECHO ? f->length : MAX_ECHO);
		break;
	case T_INFO:
		info.length = 0;
		machine_info(&info);
		out_frame(f->channel, T_REPLY, info.data, info.length);
		break;
	case T_IDENTITY:
		identity(f);
		break;
	case T_SHUTDOWN:
		shut_down(f);
		break;
	default:
		channel_frame(f);
	}
}

/* Every frame causes at most one control frame at once, so with room for one it may be handled. */
static void handle_input(void)
{
	struct frame f;
	while (out_room_control()) {
		if (hunting && !in_hunt())
			return;
		hunting = false;
		switch (in_next(&f)) {
		case P_NONE:
			return;
		case P_GARBAGE:
			if (session)
				violation("not a frame");
			hunting = true;
			break;
		case P_FRAME:
			handle(&f);
			break;
		case P_MARK:
			break;
		}
	}
}

/* ---- the port */

static int open_port(const char *path)
{
	char file[300], name[64];
	int fd = open(path ? path : "/dev/virtio-ports/" PORT_NAME, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
	DIR *dir = fd < 0 && !path ? opendir("/sys/class/virtio-ports") : NULL;
	if (!dir)
		return fd;
	for (struct dirent *d; fd < 0 && (d = readdir(dir));) { /* without udev there are no names in /dev */
		snprintf(file, sizeof file, "/sys/class/virtio-ports/%s/name", d->d_name);
		if (d->d_name[0] == '.' || !read_small(file, name, sizeof name) || strcmp(name, PORT_NAME "\n"))
			continue;
		snprintf(file, sizeof file, "/dev/%s", d->d_name);
		fd = open(file, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
	}
	closedir(dir);
	return fd;
}

static void lose_host(void)
{
	if (is_socket)
		exit(0);
	end_session();
	in_clear();
	out_clear();
	hunting = connected = false;
}

/* A port without a host is permanently "hung up", so it is not polled: SIGIO tells, and a slow tick to be sure. */
static void look_for_host(void)
{
	struct pollfd p = {.fd = port, .events = POLLIN | POLLOUT};
	if (poll(&p, 1, 0) < 0 || p.revents & (POLLHUP | POLLERR))
		return;
	connected = true;
	announce();
}

static void receive(void)
{
	size_t room;
	uint8_t *space = in_space(&room);
	ssize_t n = read(port, space, room);
	if (n > 0)
		in_added((size_t)n);
	else if (n == 0 || (errno != EAGAIN && errno != EINTR))
		lose_host();
}

static void transmit(void)
{
	size_t length;
	const uint8_t *data = out_data(&length);
	ssize_t n = length ? write(port, data, length) : 0;
	if (n > 0)
		out_sent((size_t)n);
	else if (n < 0 && errno != EAGAIN && errno != EINTR)
		lose_host();
}

static void take_signals(void)
{
	struct signalfd_siginfo info[8];
	ssize_t n = read(signals, info, sizeof info);
	for (ssize_t i = 0; i < n / (ssize_t)sizeof *info; i++)
		if (info[i].ssi_signo == SIGTERM || info[i].ssi_signo == SIGINT) {
			end_session();
			exit(0);
		}
	channels_reap();
}

/* The time until `at`, if it is something and comes before `timeout` (-1: never). */
static int sooner(int timeout, int64_t at)
{
	int64_t left = at - now_ms();
	return at && (timeout < 0 || left < timeout) ? (left > 0 ? (int)left : 0) : timeout;
}

static void step(void)
{
	static struct pollfd fds[2 + 4 * MAX_CHANNELS];
	static bool again; /* there is room for frames that had to wait, and perhaps nothing else to wake up for */
	int timeout = again ? 0 : channels_timeout();
	if (!connected && (timeout < 0 || timeout > TICK_MS))
		timeout = TICK_MS;
	if (going)
		timeout = 20;
	timeout = sooner(timeout, flush_at);
	timeout = sooner(timeout, awake_at);
	short events = (short)((out_room_control() ? POLLIN : 0) | (out_used() ? POLLOUT : 0));
	fds[0] = (struct pollfd){.fd = signals, .events = POLLIN};
	fds[1] = (struct pollfd){.fd = connected ? port : -1, .events = events};
	size_t count = 2 + channels_poll(fds + 2, sizeof fds / sizeof *fds - 2);
	if (poll(fds, count, timeout) < 0)
		return;
	if (fds[0].revents)
		take_signals();
	if (!connected)
		look_for_host();
	else if (fds[1].revents & POLLIN)
		receive();
	else if (fds[1].revents & (POLLHUP | POLLERR | POLLNVAL))
		lose_host();
	handle_input();
	channels_serve();
	again = !out_room_control();
	if (connected)
		transmit(); /* at once: most of the time it would only be asked to wait for what is there already */
	again = again && out_room_control();
	if (awake_at && now_ms() >= awake_at) {
		awake_at = 0;
		channels_awake();
	}
	if (flush_at && now_ms() >= flush_at) {
		flush_at = 0;
		fork_forgotten(identity_flush);
	}
	if (going && (!out_used() || now_ms() - going_since > 500))
		machine_down(going == REBOOT);
}

/* ---- start */

/* After a resume or a fork everybody in the guest wakes at once; the agent's answer is what the host waits for. */
static void take_precedence(void)
{
	struct sched_param p = {.sched_priority = PRIORITY};
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		perror("corral-guest: mlockall");
	if (syscall(SYS_sched_setscheduler, 0, SCHED_FIFO | SCHED_RESET_ON_FORK, &p)) /* musl has only a stub of it */
		perror("corral-guest: SCHED_FIFO");
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "-900", 4) < 0)
			perror("corral-guest: oom_score_adj");
		close(fd);
	}
}

int main(int argc, char **argv)
{
	const char *path = NULL;
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--pretend")) {
			pretend = true;
		} else if (!strcmp(argv[i], "--version")) {
			puts(VERSION);
			return 0;
		} else if (!strcmp(argv[i], "--port") && i + 1 < argc) {
			path = argv[++i];
		} else if (!strcmp(argv[i], "--socket-fd") && i + 1 < argc) {
			port = atoi(argv[++i]);
			is_socket = true;
		} else {
			fprintf(stderr, "usage: corral-guest [--port PATH | --socket-fd N] [--pretend] [--version]\n");
			return 2;
		}
	}
	sigset_t set;
	sigemptyset(&set);
	for (const int *s = (const int[]){SIGCHLD, SIGIO, SIGTERM, SIGINT, SIGPIPE, 0}; *s; s++)
		sigaddset(&set, *s);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sigdelset(&set, SIGPIPE); /* blocked only: a write to a closed pipe says EPIPE */
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	for (int tries = 0; !is_socket && (port = open_port(path)) < 0; tries++)
		nanosleep(&(struct timespec){.tv_nsec = tries < 1000 ? 10000000 : 500000000}, NULL);
	fcntl(port, F_SETFD, FD_CLOEXEC);
	fcntl(port, F_SETOWN, getpid());
	if (signals < 0 || fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC) < 0) {
		perror("corral-guest");
		return 1;
	}
	if (!pretend)
		take_precedence();
	if (getrandom(instance, sizeof instance, GRND_NONBLOCK) != sizeof instance) { /* early in the boot: unique is enough */
		struct timespec t;
		clock_gettime(CLOCK_REALTIME, &t);
		memcpy(instance, &t, sizeof t < sizeof instance ? sizeof t : sizeof instance);
	}
	for (;;)
		step();
}
