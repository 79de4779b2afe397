/* What the guest says about itself, and how it goes down. */
#include "agent.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum { DOWN_MS = 2000 }; /* for the programs of a micro guest, to end in good order */

bool read_small(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return false;
	ssize_t n = read(fd, buffer, size - 1);
	close(fd);
	buffer[n > 0 ? n : 0] = 0;
	return n > 0;
}

static void pretty_name(struct text *out)
{
	char buffer[4096];
	if (!read_small("/etc/os-release", buffer, sizeof buffer) && !read_small("/usr/lib/os-release", buffer, sizeof buffer))
		return;
	for (char *line = buffer; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, "PRETTY_NAME=", 12))
			continue;
		char *value = line + 12;
		value += *value == '"' || *value == '\'';
		add_field(out, F_OS, value, strcspn(value, "\"'\n"));
		return;
	}
}

static void addresses(struct text *out)
{
	struct ifaddrs *all;
	if (getifaddrs(&all))
		return;
	for (struct ifaddrs *i = all; i; i = i->ifa_next) {
		char text[INET6_ADDRSTRLEN];
		if (!i->ifa_addr || i->ifa_flags & IFF_LOOPBACK)
			continue;
		int family = i->ifa_addr->sa_family;
		const void *raw = family == AF_INET ? (void *)&((struct sockaddr_in *)i->ifa_addr)->sin_addr
		                                    : (void *)&((struct sockaddr_in6 *)i->ifa_addr)->sin6_addr;
		if ((family == AF_INET || family == AF_INET6) && inet_ntop(family, raw, text, sizeof text))
			add_field(out, F_ADDRESS, text, strlen(text));
	}
	freeifaddrs(all);
}

/* Ready: the image's own start-up is done. An image that wants to say so makes /run/corral early and
 * /run/corral/ready at the end; cloud-init's own files do it for stock cloud images; else being here is enough. */
static bool is_ready(void)
{
	if (!access("/run/corral/ready", F_OK))
		return true;
	if (!access("/run/corral", F_OK))
		return false;
	return access("/run/cloud-init/enabled", F_OK) || !access("/run/cloud-init/result.json", F_OK);
}

void machine_info(struct text *out)
{
	struct utsname name;
	char buffer[64];
	add_field(out, F_VERSION, VERSION, strlen(VERSION));
	if (!uname(&name)) {
		add_field(out, F_HOSTNAME, name.nodename, strlen(name.nodename));
		add_field(out, F_KERNEL, name.release, strlen(name.release));
	}
	pretty_name(out);
	if (read_small("/proc/sys/kernel/random/boot_id", buffer, sizeof buffer))
		add_field(out, F_BOOT_ID, buffer, strcspn(buffer, "\n"));
	add_field(out, F_READY, is_ready() ? "\1" : "\0", 1);
	addresses(out); /* last: with a great many addresses some are left out, nothing else */
}

/* A system with a service manager is asked to go down; a micro guest, whose process 1 is a script, is taken down. */
bool machine_shutdown(bool reboot)
{
	if (!access("/run/systemd/system", F_OK))
		return spawn_forgotten((char *[]){"systemctl", "--no-block", reboot ? "reboot" : "poweroff", NULL});
	if (!access("/etc/inittab", F_OK) || !access("/run/openrc", F_OK))
		return spawn_forgotten((char *[]){reboot ? "reboot" : "poweroff", NULL});
	return false;
}

/* The number of the newest process. */
static long newest(void)
{
	char text[128], *last;
	if (!read_small("/proc/loadavg", text, sizeof text) || !(last = strrchr(text, ' ')))
		return 0;
	return atol(last);
}

/* Whether processes run that are not newer than `limit`, besides us and process 1. */
static bool others_run(long limit)
{
	DIR *dir = opendir("/proc");
	if (!dir)
		return false;
	bool found = false;
	for (struct dirent *d; !found && (d = readdir(dir));) {
		char path[32 + sizeof d->d_name], one[2];
		long pid = isdigit((unsigned char)d->d_name[0]) ? atol(d->d_name) : 0;
		if (pid <= 1 || pid > limit || pid == getpid())
			continue;
		snprintf(path, sizeof path, "/proc/%ld/cmdline", pid); /* empty for kernel threads and zombies */
		found = read_small(path, one, sizeof one);
	}
	closedir(dir);
	return found;
}

void machine_down(bool reboot_)
{
	int64_t end = now_ms() + DOWN_MS;
	long limit = newest(); /* a start-up script may go on starting programs: do not wait for those */
	kill(-1, SIGTERM);
	kill(-1, SIGHUP); /* shells at a terminal go by this one */
	while (others_run(limit) && now_ms() < end)
		nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	kill(-1, SIGKILL);
	sync();
	reboot(reboot_ ? RB_AUTOBOOT : RB_POWER_OFF);
}
