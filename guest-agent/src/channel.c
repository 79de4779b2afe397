/* Programs. Each has a channel: pipes (or a terminal), credit for its output, a ring for its input, and one end. */
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAX_ORPHANS = 256, GRACE_MS = 250 };

struct channel {
	uint32_t id;               /* 0: free */
	bool started, reaped, tty, eof;
	pid_t pid;
	int status;
	int fd[ENDS];               /* our ends; -1: closed */
	int slot[ENDS];             /* where in the last poll; -1: was not asked */
	uint32_t credit;           /* cost of output that the host will still take */
	uint8_t *ring;             /* input that the program has not taken yet; made at the first byte */
	uint32_t ring_head, ring_used, consumed;
	bool limited;              /* it has a control group of its own */
	bool first;                /* it goes before others */
	int64_t quiet_since;       /* after its end: when output was last seen, or could not be sent */
};

static struct channel channels[MAX_CHANNELS];
static size_t first;                        /* who is served first: it goes round */
static pid_t orphans[MAX_ORPHANS];          /* killed or forgotten, but not reaped yet */
static size_t orphan_count;
static struct pollfd *polled;

static void shut(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void release(struct channel *c)
{
	for (int i = 0; i < ENDS; i++)
		shut(&c->fd[i]);
	free(c->ring);
	if (c->limited)
		limit_drop(c->id);
	if (!c->reaped && orphan_count < MAX_ORPHANS) /* channel_exec keeps room for every channel */
		orphans[orphan_count++] = c->pid;
	*c = (struct channel){0};
}

static void kill_program(struct channel *c)
{
	pid_t group;
	if (c->limited)
		limit_kill(c->id);
	if (c->reaped)
		return; /* its number may belong to somebody else by now */
	if (c->tty && c->fd[STDOUT] >= 0 && !ioctl(c->fd[STDOUT], TIOCGPGRP, &group) && group > 1)
		kill(-group, SIGKILL);
	kill(-c->pid, SIGKILL);
	kill(c->pid, SIGKILL); /* before its setsid() there is no such group */
}

void channels_kill_all(void)
{
	for (size_t i = 0; i < MAX_CHANNELS; i++)
		if (channels[i].id) {
			kill_program(&channels[i]);
			release(&channels[i]);
		}
}

void channels_awake(void)
{
	for (size_t i = 0; i < MAX_CHANNELS; i++) {
		struct channel *c = &channels[i];
		if (c->id && c->first && !c->reaped)
			program_ordinary(c->pid);
		c->first = false;
	}
}

void channels_reap(void)
{
	int status;
	for (size_t i = 0; i < MAX_CHANNELS; i++) {
		struct channel *c = &channels[i];
		if (!c->id || c->reaped || waitpid(c->pid, &status, WNOHANG) != c->pid)
			continue;
		c->reaped = true;
		c->status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
		c->quiet_since = now_ms();
	}
	for (size_t i = 0; i < orphan_count;)
		if (waitpid(orphans[i], &status, WNOHANG) != 0)
			orphans[i] = orphans[--orphan_count];
		else
			i++;
}

/* ---- start */

static void refuse(uint32_t id, const char *why)
{
	char text[256] = {126};
	out_frame(id, T_FAILED, text, 1 + (size_t)snprintf(text + 1, sizeof text - 1, "%s", why));
}

static struct channel *find(uint32_t id)
{
	for (size_t i = 0; i < MAX_CHANNELS; i++)
		if (channels[i].id == id)
			return &channels[i];
	return NULL;
}

bool channel_open(uint32_t id) { return id && find(id); }

static void channel_exec(struct frame *f)
{
	struct program p;
	struct channel *c = find(0);
	const char *why = f->channel == 0 || find(f->channel) ? "that channel is in use" : program_parse(f, &p);
	if (!why && (!c || orphan_count + MAX_CHANNELS >= MAX_ORPHANS))
		why = "too many programs";
	if (!why && p.processes)
		why = limit_make(p.limit = f->channel, p.processes);
	if (why) {
		refuse(f->channel, why);
		return;
	}
	*c = (struct channel){.fd = {-1, -1, -1, -1}, .slot = {-1, -1, -1, -1}, .tty = p.tty, .credit = WINDOW};
	c->limited = p.limit;
	c->first = p.first = awake_at;
	c->pid = program_start(&p, c->fd);
	c->reaped = c->pid < 0;
	c->id = f->channel;
	if (c->pid < 0) {
		refuse(f->channel, strerror(errno));
		release(c);
	}
}

/* As fork(): a child whose end nobody waits for. -1: there are too many. */
static pid_t fork_orphan(void)
{
	pid_t pid = orphan_count + MAX_CHANNELS < MAX_ORPHANS ? fork() : -1;
	if (pid == 0) {
		child_defaults();
		setsid();
	} else if (pid > 0) {
		orphans[orphan_count++] = pid;
	}
	return pid;
}

bool spawn_forgotten(char *const argv[])
{
	pid_t pid = fork_orphan();
	if (pid == 0) {
		setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
		execvp(argv[0], argv);
		_exit(127);
	}
	return pid > 0;
}

bool fork_forgotten(void (*work)(void))
{
	pid_t pid = fork_orphan();
	if (pid == 0)
		work();
	return pid > 0;
}

/* ---- what the host sends */

static void channel_input(struct channel *c, const struct frame *f)
{
	if (f->length > STDIN_WINDOW - c->ring_used - c->consumed) {
		violation("more input than credit");
		return;
	}
	if (c->fd[STDIN] < 0 || c->eof || (!c->ring && !(c->ring = malloc(STDIN_WINDOW)))) {
		c->consumed += f->length; /* it has closed its input: nobody will read this */
		return;
	}
	for (uint32_t done = 0, tail, n; done < f->length; done += n, c->ring_used += n) {
		tail = (c->ring_head + c->ring_used) % STDIN_WINDOW;
		n = f->length - done;
		n = n < STDIN_WINDOW - tail ? n : STDIN_WINDOW - tail;
		memcpy(c->ring + tail, f->payload + done, n);
	}
}

static void channel_signal(struct channel *c, const struct frame *f)
{
	pid_t group;
	int number = f->length == 1 ? f->payload[0] : 0;
	if (number < 1 || number > 64 || c->reaped)
		return;
	if (c->tty && !ioctl(c->fd[STDOUT], TIOCGPGRP, &group) && group > 1)
		kill(-group, number);
	else if (kill(-c->pid, number))
		kill(c->pid, number);
}

void channel_frame(struct frame *f)
{
	if (f->type == T_EXEC) {
		channel_exec(f);
		return;
	}
	struct channel *c = f->channel ? find(f->channel) : NULL;
	if (!c)
		return; /* it has just ended: the host did not know yet */
	switch (f->type) {
	case T_STDIN:
		channel_input(c, f);
		break;
	case T_EOF:
		c->eof = true;
		break;
	case T_SIGNAL:
		channel_signal(c, f);
		break;
	case T_RESIZE:
		if (c->tty && f->length == 4)
			ioctl(c->fd[STDOUT], TIOCSWINSZ, &(struct winsize){
				.ws_row = (unsigned short)(f->payload[0] | f->payload[1] << 8),
				.ws_col = (unsigned short)(f->payload[2] | f->payload[3] << 8)});
		break;
	case T_CREDIT:
		if (f->length != 4 || get32(f->payload) > WINDOW - c->credit)
			violation("credit above the window");
		else
			c->credit += get32(f->payload);
		break;
	case T_CLOSE:
		kill_program(c);
		out_frame(c->id, T_EXIT, "\x89", 1); /* 128 + SIGKILL */
		release(c);
		break;
	default:
		violation("unknown frame type");
	}
}

/* ---- moving bytes */

size_t channels_poll(struct pollfd *fds, size_t limit)
{
	size_t n = 0;
	polled = fds;
	for (size_t i = 0; i < MAX_CHANNELS; i++) {
		struct channel *c = &channels[i];
		bool output = c->id && c->started && c->credit > FRAME_COST && out_room_data();
		bool input = c->id && c->ring_used;
		bool wanted[ENDS] = {c->id && out_room_control(), output, output, input};
		for (int k = 0; k < ENDS; k++) {
			c->slot[k] = -1;
			if (!wanted[k] || c->fd[k] < 0 || n >= limit)
				continue;
			fds[n] = (struct pollfd){.fd = c->fd[k], .events = k == STDIN ? POLLOUT : POLLIN};
			c->slot[k] = (int)n++;
		}
	}
	return n;
}

static bool is_due(const struct channel *c, int which)
{
	return c->slot[which] >= 0 && c->fd[which] >= 0 && polled[c->slot[which]].revents;
}

static void serve_start(struct channel *c)
{
	char text[512];
	ssize_t n = read(c->fd[ERR_PIPE], text, sizeof text);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	shut(&c->fd[ERR_PIPE]);
	if (n > 0) {
		out_frame(c->id, T_FAILED, text, (size_t)n);
		release(c);
		return;
	}
	c->started = true;
	out_frame(c->id, T_STARTED, NULL, 0);
}

static void serve_output(struct channel *c, int which)
{
	size_t room = out_room_data();
	if (!room || c->credit <= FRAME_COST)
		return;
	if (room > c->credit - FRAME_COST)
		room = c->credit - FRAME_COST;
	ssize_t n = read(c->fd[which], out_reserve(room), room);
	if (n > 0) {
		out_commit(c->id, which == STDOUT ? T_STDOUT : T_STDERR, (size_t)n);
		c->credit -= (uint32_t)n + FRAME_COST;
		c->quiet_since = c->reaped ? now_ms() : 0;
	} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
		shut(&c->fd[which]); /* a terminal says EIO when its last user has gone */
	}
}

static void serve_input(struct channel *c)
{
	uint32_t run = STDIN_WINDOW - c->ring_head;
	run = run < c->ring_used ? run : c->ring_used;
	ssize_t n = write(c->fd[STDIN], c->ring + c->ring_head, run);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n < 0) { /* it has closed its input */
		shut(&c->fd[STDIN]);
		n = (ssize_t)c->ring_used;
	}
	c->ring_head = (c->ring_head + (uint32_t)n) % STDIN_WINDOW;
	c->ring_used -= (uint32_t)n;
	c->consumed += (uint32_t)n;
}

static void serve_eof(struct channel *c)
{
	struct termios t;
	if (!c->eof || c->ring_used || c->fd[STDIN] < 0 || !c->started)
		return;
	/* A terminal has no end of input, it has a character that means it. */
	if (c->tty && !tcgetattr(c->fd[STDIN], &t) && write(c->fd[STDIN], &t.c_cc[VEOF], 1) < 0 && errno == EAGAIN)
		return;
	shut(&c->fd[STDIN]);
}

static bool unheard(const struct channel *c, int which)
{
	return c->fd[which] >= 0 && c->slot[which] < 0;
}

static void serve_end(struct channel *c)
{
	bool open_output = c->fd[STDOUT] >= 0 || c->fd[STDERR] >= 0;
	if (!c->reaped || !c->started || !out_room_control())
		return;
	/* Quiet is only what was listened to: without credit or room outputs are not polled, and while the host is slow
	   any time may have passed since. */
	if (unheard(c, STDOUT) || unheard(c, STDERR) || c->credit <= FRAME_COST || !out_room_data())
		c->quiet_since = now_ms();
	/* A program left in the background may hold the output open for ever: do not wait for it. */
	if (open_output && now_ms() - c->quiet_since < GRACE_MS)
		return;
	uint8_t end[2] = {(uint8_t)c->status, 1};
	out_frame(c->id, T_EXIT, end, c->limited && limit_reached(c->id) ? 2 : 1);
	release(c);
}

void channels_serve(void)
{
	first = (first + 1) % MAX_CHANNELS;
	for (size_t i = 0; i < MAX_CHANNELS; i++) {
		struct channel *c = &channels[(first + i) % MAX_CHANNELS];
		if (c->id && is_due(c, ERR_PIPE) && out_room_control())
			serve_start(c);
		if (c->id && is_due(c, STDOUT))
			serve_output(c, STDOUT);
		if (c->id && is_due(c, STDERR))
			serve_output(c, STDERR);
		if (c->id && is_due(c, STDIN))
			serve_input(c);
		if (c->id && c->consumed >= STDIN_WINDOW / 4 && out_room_control()) {
			uint8_t credit[4];
			put32(credit, c->consumed);
			out_frame(c->id, T_CREDIT, credit, sizeof credit);
			c->consumed = 0;
		}
		if (c->id)
			serve_eof(c);
		if (c->id)
			serve_end(c);
	}
}

int channels_timeout(void)
{
	int64_t now = now_ms(), soonest = -1;
	for (size_t i = 0; i < MAX_CHANNELS; i++) {
		struct channel *c = &channels[i];
		if (c->id && c->tty && c->eof && c->fd[STDIN] >= 0 && !c->ring_used)
			soonest = soonest < 0 || soonest > 20 ? 20 : soonest; /* a full terminal: try again */
		if (!c->id || !c->reaped || !c->started || c->credit <= FRAME_COST || !out_room_data())
			continue;
		int64_t left = c->quiet_since + GRACE_MS - now;
		left = left < 0 ? 0 : left;
		soonest = soonest < 0 || left < soonest ? left : soonest;
	}
	return (int)soonest;
}
