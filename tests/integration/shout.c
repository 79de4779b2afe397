/* For guests: tells a port of the host its host name and a number, ten times a second, whatever becomes of that. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    struct sockaddr_in host = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    inet_pton(AF_INET, "10.0.2.2", &host.sin_addr);
    int out = socket(AF_INET, SOCK_DGRAM, 0);
    for (unsigned long number = 0;; number++) {
        char name[80], text[120];
        if (gethostname(name, sizeof name)) return 1;
        int size = snprintf(text, sizeof text, "%s %lu", name, number);
        sendto(out, text, (size_t)size, 0, (struct sockaddr *)&host, sizeof host);
        nanosleep(&(struct timespec){0, 100000000}, NULL);
    }
}
