// PID 1 of the emulated machine: takes a job (a tar) from the host port, runs /job/cmd, sends its output back.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void put(int port, const char *p, size_t n) { outsb(port, p, n); outb(1, 0x8913); }
static void die(const char *what) {
  char b[200];
  int n = snprintf(b, sizeof b, "avx512emu agent: %s: %s\n", what, strerror(errno));
  put(0x8912, b, n);
  outb(98, 0x8914);
}
static int run(char **argv) {
  pid_t p = fork();
  if (p == 0) { execv(argv[0], argv); _exit(127); }
  int st = 0;
  waitpid(p, &st, 0);
  return st;
}
static char buf[1 << 18];

int main(void) {
  if (iopl(3)) { perror("iopl"); return 1; }
  mkdir("/proc", 0755); mkdir("/sys", 0755); mkdir("/dev", 0755); mkdir("/tmp", 01777); mkdir("/job", 0755);
  mount("proc", "/proc", "proc", 0, "");
  mount("sysfs", "/sys", "sysfs", 0, "");
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  mkdir("/dev/shm", 01777);
  mount("tmpfs", "/dev/shm", "tmpfs", 0, "");
  symlink("/proc/self/fd", "/dev/fd"); symlink("/proc/self/fd/0", "/dev/stdin");
  symlink("/proc/self/fd/1", "/dev/stdout"); symlink("/proc/self/fd/2", "/dev/stderr");
  sethostname("avx512emu", 9);
  memset(buf, 1, sizeof buf);
  if (!inb(0x8915)) {
    outb(1, 0x8915);                     // the state is saved here, at bochs's next event check
    while (!inb(0x8915)) usleep(1000);   // a restored machine goes on here
  }
  // the job: its length in decimal and a newline, then a tar
  size_t len = 0;
  for (;;) { int c = inb(0x8910); if (c == '\n') break; if (c < '0' || c > '9') die("bad job"); len = len * 10 + c - '0'; }
  int fd = open("/job.tar", O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0) die("/job.tar");
  while (len) {
    size_t n = len < sizeof buf ? len : sizeof buf;
    insl(0x8910, buf, (n + 3) / 4);
    if (write(fd, buf, n) != (ssize_t)n) die("write /job.tar (guest memory full?)");
    len -= n;
  }
  close(fd);
  char *untar[] = {"/bin/busybox", "tar", "xf", "/job.tar", "-C", "/", 0};
  if (run(untar)) die("tar");
  unlink("/job.tar");

  int o[2], e[2];
  pipe(o); pipe(e);
  pid_t p = fork();
  if (p == 0) {
    int in = open("/dev/null", O_RDONLY);
    dup2(in, 0); dup2(o[1], 1); dup2(e[1], 2);
    close(in); close(o[0]); close(o[1]); close(e[0]); close(e[1]);
    setsid();
    execl("/bin/busybox", "sh", "/job/cmd", (char *)0);
    _exit(127);
  }
  close(o[1]); close(e[1]);
  struct pollfd f[2] = {{o[0], POLLIN, 0}, {e[0], POLLIN, 0}};
  int st = 0, ended = 0;
  while (f[0].fd >= 0 || f[1].fd >= 0) {
    int k = poll(f, 2, ended ? 50 : 500), got = 0;
    if (k < 0 && errno != EINTR) break;
    for (int i = 0; i < 2 && k > 0; i++) {
      if (!f[i].revents) continue;
      ssize_t n = read(f[i].fd, buf, sizeof buf);
      if (n > 0) { put(0x8911 + i, buf, n); got = 1; }
      else f[i].fd = -1;
    }
    if (!ended && waitpid(p, &st, WNOHANG) == p) ended = 1;
    else if (ended && !got) break;       // the job is over; something it left behind still holds a pipe
    if (!ended && got) usleep(2000);      // many small writes come here as few reads
  }
  if (!ended) waitpid(p, &st, 0);
  outb(WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st), 0x8914);
  for (;;) pause();
}
