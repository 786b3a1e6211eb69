/* Loaded before libc, this makes the wall clock jump: every 50 ms of the monotonic clock to another hour, back as often
   as forth. Names each process that it is loaded into as a file of the folder CLOCK_JUMPS. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump_s(void) {
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  unsigned long at = now.tv_sec * 20ul + now.tv_nsec / 50000000;
  return (long)((at * 2654435761ul >> 7) % 96) * 3600 - 48 * 3600;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int failed = syscall(SYS_clock_gettime, clock, time);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += jump_s();
  return failed;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  time->tv_sec = now.tv_sec;
  time->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}

__attribute__((constructor)) static void loaded(void) {
  char name[4096];
  snprintf(name, sizeof name, "%s/%d", getenv("CLOCK_JUMPS"), getpid());
  close(open(name, O_CREAT | O_WRONLY, 0600));
}
