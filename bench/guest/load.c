/* What guests do while their shares are measured. No library beyond libc, static, so that it runs in any guest.
 *
 *   load busy                        for ever
 *   load wave ON_MS OFF_MS           busy and asleep in turns
 *   load thief PERIOD_US SLEEP_US    busy, but asleep for the last SLEEP_US of every period: whoever is charged by
 *                                    sampling at ticks of this period is not charged at all. The phase drifts by a
 *                                    thousandth of a period each time, so that it meets every tick sooner or later.
 *   load count WINDOW_MS WINDOWS FILE   busy; writes how much work was done in each window
 *   load dirty MIB_S MIB             writes one word in each page of MIB of memory, in turn, so many MiB a second
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CHUNK = 2000 }; /* about 20 microseconds of an emulated CPU: what looking at the clock costs does not count */

static volatile uint64_t sink;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until(int64_t at) {
    struct timespec t = {at / 1000000000, at % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void work(void) {
    uint64_t x = sink;
    for (int i = 0; i < CHUNK; i++) x = x * 6364136223846793005u + 1442695040888963407u;
    sink = x;
}

static uint64_t work_until(int64_t at) {
    uint64_t done = 0;
    for (; now_ns() < at; done++) work();
    return done;
}

static void wave(int64_t on, int64_t off) {
    for (int64_t at = now_ns();;) {
        work_until(at += on);
        sleep_until(at += off);
    }
}

static void thief(int64_t period, int64_t asleep) {
    for (int64_t at = now_ns();;) {
        at += period + period / 1000;
        work_until(at - asleep);
        sleep_until(at);
    }
}

static int count(int64_t window, int windows, const char *path) {
    uint64_t *done = calloc((size_t)windows, sizeof *done);
    int64_t *took = calloc((size_t)windows, sizeof *took);
    if (!done || !took) return 1;
    int64_t before = now_ns();
    for (int i = 0; i < windows; i++) {
        done[i] = work_until(before + window);
        int64_t after = now_ns();
        took[i] = after - before;
        before = after;
    }
    FILE *file = fopen(path, "w");
    if (!file) return 1;
    for (int i = 0; i < windows; i++) fprintf(file, "%llu %lld\n", (unsigned long long)done[i], (long long)took[i]);
    return fclose(file) ? 1 : 0;
}

static int dirty(int64_t rate, size_t size) {
    enum { PAGE = 4096, SLICE_MS = 10 };
    volatile char *area = malloc(size);
    if (!area) return 1;
    size_t at = 0;
    for (int64_t next = now_ns(), n = 1;; n++) {
        for (int64_t left = (rate << 20) / PAGE * SLICE_MS / 1000; left > 0; left--, at = (at + PAGE) % size) {
            *(volatile int64_t *)(area + at) = n;
        }
        sleep_until(next += SLICE_MS * 1000000);
    }
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "busy";
    if (!strcmp(mode, "wave") && argc > 3) wave(atoll(argv[2]) * 1000000, atoll(argv[3]) * 1000000);
    if (!strcmp(mode, "thief") && argc > 3) thief(atoll(argv[2]) * 1000, atoll(argv[3]) * 1000);
    if (!strcmp(mode, "count") && argc > 4) return count(atoll(argv[2]) * 1000000, atoi(argv[3]), argv[4]);
    if (!strcmp(mode, "dirty") && argc > 3) return dirty(atoll(argv[2]), (size_t)atoll(argv[3]) << 20);
    if (strcmp(mode, "busy")) return 2;
    for (;;) work();
}
