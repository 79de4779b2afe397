/* Makes this guest somebody: all in one message, because after a fork every round trip and every touched page of the
 * guest costs milliseconds. Nothing waits for the disk for the same reason: it is flushed a moment later, and by a
 * process without precedence (identity_flush). What fails is named, the rest is done. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct text *failures;
static bool changed; /* some file, by the message at hand */

static void failed(const char *what) { add_words(failures, "%s%s: %s", failures->length ? "; " : "", what, strerror(errno)); }

static void wrong(const char *what) { errno = EINVAL; failed(what); }

static bool write_all(int fd, const void *data, size_t length)
{
	for (const char *p = data; length;) {
		ssize_t n = write(fd, p, length);
		if (n <= 0)
			return false;
		p += n;
		length -= (size_t)n;
	}
	return true;
}

static bool holds(int fd, const void *data, size_t length)
{
	static char old[MAX_CONTROL];
	return length < sizeof old && pread(fd, old, sizeof old, 0) == (ssize_t)length && !memcmp(old, data, length);
}

/* Write over a file that is there. Its page is in memory and its block is its own, so nothing else happens; a new file
 * in its place would have its blocks chosen and sent to the disk at once (ext4), which takes fifty times as long. */
static bool overwrite(const char *path, const void *data, size_t length, mode_t mode)
{
	struct stat now;
	int fd = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	bool good = fd >= 0 && !fstat(fd, &now) && S_ISREG(now.st_mode) && ((now.st_mode & 07777) == mode || !fchmod(fd, mode));
	if (good && !holds(fd, data, length)) {
		changed = true;
		good = write_all(fd, data, length) && !ftruncate(fd, (off_t)length);
	}
	if (fd >= 0)
		close(fd);
	return good;
}

/* Have a file say this: over the old one, or in its place where that is no plain file (resolv.conf is often a link). */
static void put(const char *path, const void *data, size_t length, mode_t mode)
{
	char temporary[128];
	if (overwrite(path, data, length, mode))
		return;
	changed = true;
	snprintf(temporary, sizeof temporary, "%s.corral", path);
	unlink(temporary);
	int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	bool good = fd >= 0 && !fchmod(fd, mode) && write_all(fd, data, length);
	if (fd >= 0)
		close(fd);
	if (good && !rename(temporary, path))
		return;
	int why = errno;
	unlink(temporary);
	errno = why;
	failed(path);
}

static void set_seed(const struct field_view *v)
{
	struct { int entropy, size; uint8_t data[256]; } pool = {0};
	if (v->length > sizeof pool.data) {
		wrong("seed");
		return;
	}
	memcpy(pool.data, v->data, v->length);
	pool.size = (int)v->length;
	pool.entropy = 8 * pool.size;
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG, 0))
		failed("seed");
	if (fd >= 0)
		close(fd);
}

/* /etc/hosts with the 127.0.1.1 line (Debian's convention) naming this host; the other lines stay. */
static void set_hosts(const char *name)
{
	static char old[16384], new[sizeof old + 300];
	size_t n = 0;
	if (!read_small("/etc/hosts", old, sizeof old))
		strcpy(old, "127.0.0.1 localhost\n");
	else if (strlen(old) == sizeof old - 1)
		return; /* longer than we read: keep our hands off */
	for (char *line = old, *next; *line; line = next) {
		next = strchr(line, '\n');
		next = next ? next + 1 : line + strlen(line);
		if (strncmp(line, "127.0.1.1", 9)) {
			memcpy(new + n, line, (size_t)(next - line));
			n += (size_t)(next - line);
		}
	}
	if (n && new[n - 1] != '\n')
		new[n++] = '\n';
	n += (size_t)snprintf(new + n, sizeof new - n, "127.0.1.1 %s\n", name);
	put("/etc/hosts", new, n, 0644);
}

static void set_hostname(const char *name)
{
	char line[80];
	if (sethostname(name, strlen(name)))
		failed("hostname");
	put("/etc/hostname", line, (size_t)snprintf(line, sizeof line, "%s\n", name), 0644);
	set_hosts(name);
}

/* A running sshd keeps its host keys in memory until it is told to read them again. */
static void reload_sshd(void)
{
	char text[32], path[64], name[32];
	if (!read_small("/run/sshd.pid", text, sizeof text))
		return;
	int pid = atoi(text);
	snprintf(path, sizeof path, "/proc/%d/comm", pid);
	if (pid > 1 && read_small(path, name, sizeof name) && !strcmp(name, "sshd\n") && kill(pid, SIGHUP))
		failed("sshd");
}

static void set_address(struct sockaddr *a, uint32_t address)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
	memcpy(a, &in, sizeof in);
}

/* The first network interface that is not loopback: Corral's guests are given their identity with one. */
static bool first_interface(int s, char name[IFNAMSIZ])
{
	for (int index = 1; index < 64; index++) {
		struct ifreq q = {.ifr_ifindex = index};
		if (ioctl(s, SIOCGIFNAME, &q))
			continue;
		memcpy(name, q.ifr_name, IFNAMSIZ);
		if (!ioctl(s, SIOCGIFHWADDR, &q) && q.ifr_hwaddr.sa_family == ARPHRD_ETHER)
			return true;
	}
	return false;
}

static bool set_flags(int s, const char *name, bool up)
{
	struct ifreq q = {0};
	memcpy(q.ifr_name, name, IFNAMSIZ);
	if (ioctl(s, SIOCGIFFLAGS, &q))
		return false;
	q.ifr_flags = (short)(up ? q.ifr_flags | IFF_UP : q.ifr_flags & ~IFF_UP);
	return !ioctl(s, SIOCSIFFLAGS, &q);
}

static void set_mac(int s, const char *name, const char *text)
{
	struct ifreq q = {0};
	unsigned m[6];
	char end;
	if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%c", m, m + 1, m + 2, m + 3, m + 4, m + 5, &end) != 6) {
		wrong("mac");
		return;
	}
	memcpy(q.ifr_name, name, IFNAMSIZ);
	q.ifr_hwaddr.sa_family = ARPHRD_ETHER;
	for (int i = 0; i < 6; i++)
		q.ifr_hwaddr.sa_data[i] = (char)m[i];
	if (!ioctl(s, SIOCSIFHWADDR, &q))
		return;
	/* Some drivers take it only while they are down. */
	if (errno != EBUSY || !set_flags(s, name, false) || ioctl(s, SIOCSIFHWADDR, &q))
		failed("mac");
	if (!set_flags(s, name, true))
		failed("mac");
}

/* IPv6 addresses are made of the MAC. Off and on gives it new ones, as down and up would; but that waits for everybody
 * in the kernel who may still look at the card, with a priority far below ours. */
static void renew_ipv6(const char *name)
{
	char path[64 + IFNAMSIZ], off = 0;
	snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", name);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return; /* there is no IPv6 here */
	if (pread(fd, &off, 1, 0) == 1 && off == '0' && (pwrite(fd, "1", 1, 0) != 1 || pwrite(fd, "0", 1, 0) != 1))
		failed("ipv6");
	close(fd);
}

static void set_ip(int s, const char *name, const char *text)
{
	struct ifreq q = {0};
	struct in_addr address;
	char copy[64], end;
	int prefix = -1;
	snprintf(copy, sizeof copy, "%s", text);
	char *slash = strchr(copy, '/');
	if (slash)
		*slash++ = 0;
	if (!slash || inet_pton(AF_INET, copy, &address) != 1 || sscanf(slash, "%d%c", &prefix, &end) != 1 || prefix < 0 || prefix > 32) {
		wrong("address"); /* IPv4/prefix only */
		return;
	}
	memcpy(q.ifr_name, name, IFNAMSIZ);
	set_address(&q.ifr_addr, address.s_addr);
	if (ioctl(s, SIOCSIFADDR, &q)) {
		failed("address");
		return;
	}
	set_address(&q.ifr_addr, prefix ? htonl(0xffffffffu << (32 - prefix)) : 0);
	if (ioctl(s, SIOCSIFNETMASK, &q) || !set_flags(s, name, true))
		failed("address");
}

static void set_gateway(int s, const char *text)
{
	struct in_addr gateway;
	if (inet_pton(AF_INET, text, &gateway) != 1) {
		wrong("gateway");
		return;
	}
	struct rtentry r = {.rt_flags = RTF_UP};
	set_address(&r.rt_dst, 0);
	set_address(&r.rt_genmask, 0);
	for (int i = 0; i < 8 && !ioctl(s, SIOCDELRT, &r); i++) /* older default routes */
		;
	set_address(&r.rt_gateway, gateway.s_addr);
	r.rt_flags = RTF_UP | RTF_GATEWAY;
	if (ioctl(s, SIOCADDRT, &r) && errno != EEXIST)
		failed("gateway");
}

/* The field as a string without control characters; false when it has some or is too long. */
static bool as_line(const struct field_view *v, char *line, size_t size)
{
	if (!v->data || v->length >= size)
		return false;
	for (uint32_t i = 0; i < v->length; i++)
		if (v->data[i] < 0x20 || v->data[i] == 0x7f)
			return false;
	memcpy(line, v->data, v->length);
	line[v->length] = 0;
	return v->length > 0;
}

static void set_network(const struct field_view *mac, const struct field_view *address, const struct field_view *gateway)
{
	char name[IFNAMSIZ] = "", line[64];
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (s < 0 || !first_interface(s, name)) {
		errno = s < 0 ? errno : ENODEV;
		failed("network");
	} else {
		if (mac->data && as_line(mac, line, sizeof line))
			set_mac(s, name, line);
		else if (mac->data)
			wrong("mac");
		if (mac->data)
			renew_ipv6(name);
		if (address->data && as_line(address, line, sizeof line))
			set_ip(s, name, line);
		else if (address->data)
			wrong("address");
		if (gateway->data && as_line(gateway, line, sizeof line))
			set_gateway(s, line);
		else if (gateway->data)
			wrong("gateway");
	}
	if (s >= 0)
		close(s);
}

static void set_keys(const struct field_view *private, const struct field_view *public, const struct field_view *authorized)
{
	if (private->data || public->data)
		mkdir("/etc/ssh", 0755);
	if (private->data)
		put("/etc/ssh/ssh_host_ed25519_key", private->data, private->length, 0600);
	if (public->data)
		put("/etc/ssh/ssh_host_ed25519_key.pub", public->data, public->length, 0644);
	if (private->data)
		reload_sshd();
	if (authorized->data) {
		mkdir("/root", 0700);
		mkdir("/root/.ssh", 0700);
		put("/root/.ssh/authorized_keys", authorized->data, authorized->length, 0600);
	}
}

bool identity_apply(struct fields f, struct text *out)
{
	struct field_view v, got[64] = {0};
	char line[66];
	struct text dns = {.length = 0};
	failures = out;
	changed = false;
	int more;
	while ((more = next_field(&f, &v)) == 1) {
		if (v.tag == F_DNS) {
			if (as_line(&v, line, sizeof line))
				add_words(&dns, "nameserver %s\n", line);
			else
				wrong("dns");
		} else if (v.tag < 64) {
			got[v.tag] = v;
		}
	}
	if (more < 0) {
		wrong("fields");
		return false;
	}
	if (got[F_TIME].data) {
		struct timespec t = {0};
		if (got[F_TIME].length == 12) {
			t.tv_sec = (time_t)(get32(got[F_TIME].data) | (uint64_t)get32(got[F_TIME].data + 4) << 32);
			t.tv_nsec = (long)get32(got[F_TIME].data + 8);
		}
		if (got[F_TIME].length != 12 || clock_settime(CLOCK_REALTIME, &t)) {
			errno = got[F_TIME].length != 12 ? EINVAL : errno;
			failed("time");
		}
	}
	if (got[F_SEED].data)
		set_seed(&got[F_SEED]);
	if (got[F_HOSTNAME].data && as_line(&got[F_HOSTNAME], line, sizeof line))
		set_hostname(line);
	else if (got[F_HOSTNAME].data)
		wrong("hostname");
	if (got[F_MACHINE_ID].data && as_line(&got[F_MACHINE_ID], line, sizeof line - 1)) {
		strcat(line, "\n");
		put("/etc/machine-id", line, strlen(line), 0444);
	} else if (got[F_MACHINE_ID].data) {
		wrong("machine-id");
	}
	set_keys(&got[F_HOST_KEY], &got[F_HOST_KEY_PUBLIC], &got[F_AUTHORIZED_KEYS]);
	if (got[F_MAC].data || got[F_ADDRESS].data || got[F_GATEWAY].data)
		set_network(&got[F_MAC], &got[F_ADDRESS], &got[F_GATEWAY]);
	if (dns.length)
		put("/etc/resolv.conf", dns.data, dns.length, 0644);
	return changed;
}

/* What was written goes to the disk, done by a child: it takes long, and this process keeps others from running. */
void identity_flush(void)
{
	int fd = open("/etc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0)
		syncfs(fd);
	_exit(0);
}
