/* Spoils the clock, the network and the disk of one process: LD_PRELOAD, told by a file that is mapped.

   CHAOS_HOOK  the file, a struct control; without it nothing is changed
   What a real machine does is imitated at the C library's calls: Python, uvloop and SQLite all go through them. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PORTS 32

struct control {
  volatile int64_t wall_ns;  /* added to the time of day */
  volatile int64_t boot_ns;  /* added to the time since the machine's start */
  volatile int32_t network;  /* 0 works, 1 connections hang and open ones break, 2 refused as unreachable */
  volatile int32_t disk;     /* 0 works, 1 full, 2 read-only */
  volatile int32_t hole;     /* a port where nobody answers: where connections that hang go */
  volatile int32_t known;    /* ports of which the network works, whatever is said above */
  volatile int32_t ports[PORTS];
  char directory[PATH_MAX];  /* whose disk is spoilt */
};

static struct control off;
static struct control *told = &off;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CHAOS_HOOK");
  int fd = path ? (int)syscall(257, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1; /* openat, past our own */
  if (fd < 0) return;
  void *at = mmap(0, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at != MAP_FAILED) told = at;
  close(fd);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* -- the clock ------------------------------------------------------------------------------------ */

static void add(struct timespec *at, int64_t ns) {
  int64_t sum = at->tv_nsec + ns % 1000000000;
  at->tv_sec += ns / 1000000000;
  if (sum >= 1000000000) at->tv_sec++, sum -= 1000000000;
  if (sum < 0) at->tv_sec--, sum += 1000000000;
  at->tv_nsec = sum;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
  REAL(clock_gettime);
  int result = real(clock, at);
  if (!result && clock == CLOCK_REALTIME && told->wall_ns) add(at, told->wall_ns);
  if (!result && clock == CLOCK_BOOTTIME && told->boot_ns) add(at, told->boot_ns);
  return result;
}

time_t time(time_t *out) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  if (out) *out = at.tv_sec;
  return at.tv_sec;
}

/* -- the network ---------------------------------------------------------------------------------- */

static int port_of(const struct sockaddr *address) {
  return address->sa_family == AF_INET ? ntohs(((const struct sockaddr_in *)address)->sin_port) : 0;
}

static int is_known(int port) {
  for (int i = 0; i < told->known && i < PORTS; i++)
    if (told->ports[i] == port) return 1;
  return 0;
}

/* Whether packets of that socket are lost: neither of its ends is a known one. */
static int is_lost(int fd) {
  struct sockaddr_storage here, there;
  socklen_t size = sizeof here;
  if (getsockname(fd, (struct sockaddr *)&here, &size) || here.ss_family != AF_INET) return 0;
  size = sizeof there;
  if (getpeername(fd, (struct sockaddr *)&there, &size)) return 0;
  return !is_known(port_of((struct sockaddr *)&here)) && !is_known(port_of((struct sockaddr *)&there));
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
  REAL(connect);
  if (told->network && address->sa_family == AF_INET && !is_known(port_of(address))) {
    if (told->network == 2) return errno = ENETUNREACH, -1;
    struct sockaddr_in hole = *(const struct sockaddr_in *)address;
    hole.sin_port = htons(told->hole);
    hole.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return real(fd, (struct sockaddr *)&hole, sizeof hole);
  }
  return real(fd, address, size);
}

#define BREAK_IF_LOST(fd) \
  if (told->network && is_lost(fd)) return errno = ECONNRESET, -1

ssize_t send(int fd, const void *data, size_t size, int flags) {
  REAL(send);
  BREAK_IF_LOST(fd);
  return real(fd, data, size, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  REAL(sendmsg);
  BREAK_IF_LOST(fd);
  return real(fd, message, flags);
}

ssize_t recv(int fd, void *data, size_t size, int flags) {
  REAL(recv);
  BREAK_IF_LOST(fd);
  return real(fd, data, size, flags);
}

/* -- the disk ------------------------------------------------------------------------------------- */

static int below(const char *path) {
  size_t size = strlen(told->directory);
  return size && !strncmp(path, told->directory, size) && path[size] == '/';
}

/* What writing to that file gives: 0, or the error. */
static int spoilt(int fd) {
  char name[64], path[PATH_MAX];
  struct stat about;
  if (!told->disk || fd <= 2 || fstat(fd, &about) || !S_ISREG(about.st_mode)) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(name, path, sizeof path - 1);
  if (size <= 0) return 0;
  path[size] = 0;
  return !below(path) ? 0 : told->disk == 1 ? ENOSPC : EROFS;
}

#define FAIL_IF_SPOILT(fd) \
  int wrong = told->disk ? spoilt(fd) : 0; \
  if (wrong) return errno = wrong, -1

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  if (told->network && is_lost(fd)) return errno = ECONNRESET, -1;
  FAIL_IF_SPOILT(fd);
  return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  if (told->network && is_lost(fd)) return errno = ECONNRESET, -1;
  FAIL_IF_SPOILT(fd);
  return real(fd, parts, count);
}

ssize_t read(int fd, void *data, size_t size) {
  REAL(read);
  if (told->network && is_lost(fd)) return errno = ECONNRESET, -1;
  return real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  REAL(pwrite);
  FAIL_IF_SPOILT(fd);
  return real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(pwrite64);
  FAIL_IF_SPOILT(fd);
  return real(fd, data, size, at);
}

int fallocate(int fd, int mode, off_t at, off_t size) {
  REAL(fallocate);
  FAIL_IF_SPOILT(fd);
  return real(fd, mode, at, size);
}

int posix_fallocate(int fd, off_t at, off_t size) {
  REAL(posix_fallocate);
  int wrong = told->disk ? spoilt(fd) : 0;
  return wrong ? wrong : real(fd, at, size);
}

/* Whether opening the file so is refused. */
static int refused(const char *path, int flags) {
  return told->disk == 2 && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && below(path);
}

#define OPEN(name, before, args) \
  int name(before const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    if (refused(path, flags)) return errno = EROFS, -1; \
    return real args; \
  }

#define NOTHING
#define DIRECTORY int directory,
OPEN(open, NOTHING, (path, flags, mode))
OPEN(open64, NOTHING, (path, flags, mode))
OPEN(openat, DIRECTORY, (directory, path, flags, mode))
OPEN(openat64, DIRECTORY, (directory, path, flags, mode))

int unlink(const char *path) {
  REAL(unlink);
  if (told->disk == 2 && below(path)) return errno = EROFS, -1;
  return real(path);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  if (told->disk == 2 && below(to)) return errno = EROFS, -1;
  return real(from, to);
}
