/* Frames and fields. Both buffers are fixed: whatever the host or a program does, the agent's memory does not grow. */
#include "agent.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const uint8_t MARK[MARK_SIZE] = {0xff, 'C', 'O', 'R', 'R', 'A', 'L', 0xfe, 'R', 'E', 'S', 'Y', 'N', 'C', 0xfd, '\n'};
static const uint8_t MAGIC[3] = {'C', 'G', '1'};

static uint8_t in[HEADER + MAX_PAYLOAD + 16384];
static size_t in_head, in_tail;
static uint8_t out[262144];
static size_t out_head, out_tail;

uint32_t get32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void put32(uint8_t *p, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(value >> 8 * i);
}

uint8_t *in_space(size_t *room)
{
	if (in_head == in_tail) {
		in_head = in_tail = 0;
	} else if (sizeof in - in_tail < 16384) {
		memmove(in, in + in_head, in_tail - in_head);
		in_tail -= in_head;
		in_head = 0;
	}
	*room = sizeof in - in_tail;
	return in + in_tail;
}

void in_added(size_t count) { in_tail += count; assert(in_tail <= sizeof in); }

void in_clear(void) { in_head = in_tail = 0; }

enum parsed in_next(struct frame *f)
{
	const uint8_t *p = in + in_head;
	size_t have = in_tail - in_head;
	if (have && p[0] == MARK[0] && !memcmp(p, MARK, have < MARK_SIZE ? have : MARK_SIZE)) {
		if (have < MARK_SIZE)
			return P_NONE;
		in_head += MARK_SIZE;
		return P_MARK;
	}
	if (have < HEADER)
		return P_NONE;
	f->length = get32(p);
	f->channel = get32(p + 4);
	f->type = p[8];
	if (memcmp(p + 9, MAGIC, sizeof MAGIC) || f->length > MAX_PAYLOAD)
		return P_GARBAGE;
	if (have < HEADER + f->length)
		return P_NONE;
	f->payload = in + in_head + HEADER;
	in_head += HEADER + f->length;
	return P_FRAME;
}

bool in_hunt(void)
{
	while (in_head < in_tail) {
		uint8_t *first = memchr(in + in_head, MARK[0], in_tail - in_head);
		in_head = first ? (size_t)(first - in) : in_tail;
		size_t have = in_tail - in_head;
		if (have && !memcmp(in + in_head, MARK, have < MARK_SIZE ? have : MARK_SIZE)) {
			if (have < MARK_SIZE)
				return false; /* perhaps its beginning: more bytes will tell */
			in_head += MARK_SIZE;
			return true;
		}
		in_head += have ? 1 : 0;
	}
	return false;
}

size_t out_used(void) { return out_tail - out_head; }

static size_t out_free(void)
{
	if (out_head == out_tail)
		out_head = out_tail = 0;
	return sizeof out - out_used();
}

bool out_room_control(void) { return out_free() >= HEADER + MAX_CONTROL + MARK_SIZE; }

size_t out_room_data(void)
{
	/* Half of the buffer is enough to keep the port busy; more would only make a ping wait longer. */
	return out_free() < sizeof out / 2 ? 0 : MAX_DATA;
}

uint8_t *out_reserve(size_t payload)
{
	assert(out_free() >= HEADER + payload);
	if (sizeof out - out_tail < HEADER + payload) {
		memmove(out, out + out_head, out_used());
		out_tail -= out_head;
		out_head = 0;
	}
	return out + out_tail + HEADER;
}

void out_commit(uint32_t channel, uint8_t type, size_t payload)
{
	uint8_t *p = out + out_tail;
	put32(p, (uint32_t)payload);
	put32(p + 4, channel);
	p[8] = type;
	memcpy(p + 9, MAGIC, sizeof MAGIC);
	out_tail += HEADER + payload;
}

void out_frame(uint32_t channel, uint8_t type, const void *payload, size_t length)
{
	uint8_t *p = out_reserve(length);
	if (length)
		memcpy(p, payload, length);
	out_commit(channel, type, length);
}

void out_mark(void)
{
	memcpy(out_reserve(MARK_SIZE) - HEADER, MARK, MARK_SIZE);
	out_tail += MARK_SIZE;
}

const uint8_t *out_data(size_t *length) { *length = out_used(); return out + out_head; }

void out_sent(size_t count) { out_head += count; assert(out_head <= out_tail); }

void out_clear(void) { out_head = out_tail = 0; }

int next_field(struct fields *f, struct field_view *v)
{
	size_t left = (size_t)(f->end - f->at);
	if (!left)
		return 0;
	if (left < 5)
		return -1;
	v->tag = f->at[0];
	v->length = get32(f->at + 1);
	v->data = f->at + 5;
	if (v->length > left - 5)
		return -1;
	f->at += 5 + v->length;
	return 1;
}

void add_field(struct text *t, uint8_t tag, const void *data, size_t length)
{
	if (sizeof t->data - t->length < 5 + length)
		return;
	uint8_t *p = (uint8_t *)t->data + t->length;
	p[0] = tag;
	put32(p + 1, (uint32_t)length);
	memcpy(p + 5, data, length);
	t->length += 5 + length;
}

void add_words(struct text *t, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	size_t room = sizeof t->data - t->length;
	int n = vsnprintf(t->data + t->length, room, format, args);
	if (n > 0)
		t->length += (size_t)n < room ? (size_t)n : room - 1;
	va_end(args);
}
