/* corral-guest: the resident agent inside a VM. What the files share.
 *
 *   main.c      opens the port, the event loop, sessions (hello, re-hello, garbage)
 *   wire.c      frames and fields: encode, decode, the two bounded port buffers
 *   program.c   starting a program: its user, directory, environment, pipes or terminal
 *   limit.c     how many processes a program may have
 *   channel.c   a program's channel: streams with credit, signals, end
 *   identity.c  time, entropy, names, keys, network
 *   machine.c   information about the guest; shutdown and reboot
 *
 * Protocol (its other half: src/corral/guest/frames.py). A frame is a header of 12 bytes and a payload:
 *   u32 payload length (LE, <= 64 KiB) | u32 channel (LE) | u8 type | "CG1"
 * Between two frames MARK may stand: whoever has lost the frame boundary throws bytes away until it finds MARK.
 * Channel numbers are chosen by the host, never used twice in a session; a request and its reply share one.
 * Flow control: each side may have at most WINDOW (output) or STDIN_WINDOW (input) bytes of one program unconsumed;
 * CREDIT gives back what was consumed. An output frame costs its payload + FRAME_COST, so that small frames cannot
 * fill the receiver's memory either. Structured payloads are fields: u8 tag | u32 length (LE) | bytes. */
#ifndef AGENT_H
#define AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>

#define VERSION "0.1.0"
#define PROTOCOL 1

enum {
	HEADER = 12,
	MAX_PAYLOAD = 65536,
	MAX_DATA = 32768,          /* payload of one output frame: what the virtio port takes in one write */
	WINDOW = 262144,           /* output of one program on its way to the host */
	STDIN_WINDOW = 131072,     /* input of one program, kept in its ring */
	FRAME_COST = 64,
	MAX_CHANNELS = 64,
	MARK_SIZE = 16,
	NONCE_SIZE = 16,
};

enum type {
	T_HELLO = 0x01, T_WELCOME = 0x02, T_ANNOUNCE = 0x03, T_VIOLATION = 0x04,
	T_PING = 0x10, T_INFO = 0x11, T_IDENTITY = 0x12, T_SHUTDOWN = 0x13, T_REPLY = 0x18, T_REFUSED = 0x19,
	T_EXEC = 0x20, T_STARTED = 0x21, T_FAILED = 0x22, T_STDIN = 0x23, T_EOF = 0x24, T_STDOUT = 0x25, T_STDERR = 0x26,
	T_EXIT = 0x27, T_SIGNAL = 0x28, T_RESIZE = 0x29, T_CLOSE = 0x2a, T_CREDIT = 0x2b,
};

enum field {
	/* exec */
	F_ARG = 1, F_ENV = 2, F_CWD = 3, F_USER = 4, F_TTY = 5, F_PROCESSES = 6,
	/* info */
	F_VERSION = 16, F_HOSTNAME = 17, F_OS = 18, F_KERNEL = 19, F_ADDRESS = 20, F_BOOT_ID = 21, F_READY = 22,
	/* identity; F_HOSTNAME and F_ADDRESS too */
	F_TIME = 32, F_SEED = 33, F_MACHINE_ID = 34, F_HOST_KEY = 35, F_HOST_KEY_PUBLIC = 36, F_AUTHORIZED_KEYS = 37,
	F_MAC = 38, F_GATEWAY = 39, F_DNS = 40,
};

struct frame { uint32_t length, channel; uint8_t type; uint8_t *payload; };

/* wire.c: buffers. The output buffer never grows; data frames leave the last part of it to control frames. */
extern const uint8_t MARK[MARK_SIZE];
uint32_t get32(const uint8_t *p);
void put32(uint8_t *p, uint32_t value);
enum parsed { P_NONE, P_FRAME, P_MARK, P_GARBAGE };
uint8_t *in_space(size_t *room);                /* where the next bytes from the port go */
void in_added(size_t count);
enum parsed in_next(struct frame *f);           /* the payload stays valid until the next in_* call */
bool in_hunt(void);                             /* drop bytes up to and including a MARK; true when found */
void in_clear(void);
size_t out_used(void);
bool out_room_control(void);                    /* a control frame (payload <= MAX_CONTROL) fits */
size_t out_room_data(void);                     /* payload bytes that an output frame may have now; 0: not now */
uint8_t *out_reserve(size_t payload);           /* where the payload is to be written; then out_commit */
void out_commit(uint32_t channel, uint8_t type, size_t payload);
void out_frame(uint32_t channel, uint8_t type, const void *payload, size_t length);
void out_mark(void);
const uint8_t *out_data(size_t *length);
void out_sent(size_t count);
void out_clear(void);
enum { MAX_CONTROL = 16384 };

/* wire.c: fields */
struct fields { const uint8_t *at, *end; };
struct field_view { uint8_t tag; uint32_t length; const uint8_t *data; };
int next_field(struct fields *f, struct field_view *v);  /* 1: one more, 0: the end, -1: malformed */
struct text { char data[MAX_CONTROL]; size_t length; };  /* bounded: what does not fit is left out whole */
void add_field(struct text *t, uint8_t tag, const void *data, size_t length);
__attribute__((format(printf, 2, 3))) void add_words(struct text *t, const char *format, ...);

/* program.c */
enum { ERR_PIPE, STDOUT, STDERR, STDIN, ENDS }; /* our ends of a program; ERR_PIPE: why it could not be started */
struct program { char *cwd, *user; bool tty, first; struct winsize size; uint32_t processes; uint32_t limit; };
const char *program_parse(struct frame *f, struct program *p); /* NULL, or what is wrong with it */
pid_t program_start(const struct program *p, int fd[ENDS]);    /* the one parsed last; -1: see errno */
void program_ordinary(pid_t pid);               /* it does not go first any more */
void child_defaults(void);                      /* in a child: what the agent changed for itself is undone */

/* limit.c: a control group for one program, named by its channel */
const char *limit_make(uint32_t id, uint32_t processes);  /* NULL, or what is wrong */
pid_t limit_fork(uint32_t id);                  /* as fork(), with the child in it; -1: fork, and let it */
bool limit_join(uint32_t id);                   /* in the child */
bool limit_reached(uint32_t id);                /* it wanted more than it may have */
void limit_kill(uint32_t id);                   /* everything in it */
void limit_drop(uint32_t id);                   /* now if nobody is in it any more, else with a later one */

/* channel.c */
bool channel_open(uint32_t id);
void channel_frame(struct frame *f);            /* exec, stdin, eof, signal, resize, close, credit */
void channels_kill_all(void);
void channels_awake(void);                      /* the guest has woken up: no program goes first any more */
void channels_reap(void);
struct pollfd;
size_t channels_poll(struct pollfd *fds, size_t limit);  /* fill in what to wait for */
void channels_serve(void);                      /* move what can be moved */
int channels_timeout(void);                     /* ms until something is due, -1: nothing */
bool spawn_forgotten(char *const argv[]);       /* start a program whose end nobody waits for */
bool fork_forgotten(void (*work)(void));        /* the same with a function, which does not return */

/* identity.c, machine.c */
bool identity_apply(struct fields f, struct text *failures);  /* whether files were changed */
void identity_flush(void);                      /* in a child: they go to the disk; does not return */
void machine_info(struct text *out);
bool machine_shutdown(bool reboot);             /* false: it will be done by machine_down() */
void machine_down(bool reboot);
bool read_small(const char *path, char *buffer, size_t size);

/* main.c */
extern bool pretend;                            /* --pretend: change nothing of the machine (tests on a host) */
extern int64_t awake_at;                        /* until then it has just woken; 0: it has not */
void violation(const char *why);
int64_t now_ms(void);

#endif
