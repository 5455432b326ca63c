// Links between hosts of one machine: packets from each host's TUN device reach the others after a delay, at a rate,
// and with losses. Usage: links NAMESPACE...
//
// Host i (from 1) is a network namespace; its device "npp0" is to get the address 10.88.0.i. Every ordered pair of
// hosts has a link of its own. Lines on standard input change all links or one host's, and are answered by "ok":
//   delay MS | rate MBIT | loss PERCENT | down HOST | up HOST
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr double kQueue = 1 << 20;  // bytes that may wait for a link; what comes then is dropped, as by a router
constexpr int kAtOnce = 64;         // packets read from one host before the others have their turn

struct Packet {
  double due;
  std::vector<unsigned char> bytes;
};

struct Link {
  double free_at = 0.0;
  std::deque<Packet> on_the_way;
};

struct Network {
  std::vector<int> devices;
  std::vector<bool> is_down;
  std::vector<std::vector<Link>> links;
  double delay = 0.0, rate = 125e6, loss = 0.0;
  std::mt19937 random{1};
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

[[noreturn]] void fail(const std::string& what) {
  std::perror(what.c_str());
  std::exit(1);
}

int open_device(const std::string& name) {
  const std::string path = "/var/run/netns/" + name;
  const int space = open(path.c_str(), O_RDONLY);
  if (space < 0 || setns(space, CLONE_NEWNET) != 0) fail(path);
  close(space);
  const int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  ifreq request{};
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  std::strcpy(request.ifr_name, "npp0");
  if (device < 0 || ioctl(device, TUNSETIFF, &request) != 0) fail("/dev/net/tun");
  return device;
}

void take(Network& net, size_t from) {
  unsigned char buffer[65536];
  for (int k = 0; k < kAtOnce; ++k) {
    const ssize_t size = read(net.devices[from], buffer, sizeof buffer);
    if (size <= 0) return;
    const size_t to = static_cast<size_t>(buffer[19]) - 1;  // the last byte of an IPv4 destination
    if (buffer[0] >> 4 != 4 || to >= net.devices.size() || net.is_down[from] || net.is_down[to]) continue;
    if (std::uniform_real_distribution<>(0.0, 1.0)(net.random) < net.loss) continue;
    Link& link = net.links[from][to];
    const double time = now();
    link.free_at = std::max(link.free_at, time);
    if ((link.free_at - time) * net.rate > kQueue) continue;
    link.free_at += static_cast<double>(size) / net.rate;
    link.on_the_way.push_back({link.free_at + net.delay, {buffer, buffer + size}});
  }
}

// Hands over the packets that are due; returns when the next one is.
double deliver(Network& net, double next) {
  for (size_t from = 0; from < net.devices.size(); ++from)
    for (size_t to = 0; to < net.devices.size(); ++to) {
      auto& packets = net.links[from][to].on_the_way;
      for (; !packets.empty() && packets.front().due <= now(); packets.pop_front()) {
        const auto& bytes = packets.front().bytes;
        if (!net.is_down[from] && !net.is_down[to] && write(net.devices[to], bytes.data(), bytes.size()) < 0) continue;
      }
      if (!packets.empty()) next = std::min(next, packets.front().due);
    }
  return next;
}

void obey(Network& net, const char* line) {
  double value = 0.0;
  size_t host = 0;
  if (std::sscanf(line, "delay %lf", &value) == 1) net.delay = value / 1e3;
  if (std::sscanf(line, "rate %lf", &value) == 1) net.rate = value * 1e6 / 8;
  if (std::sscanf(line, "loss %lf", &value) == 1) net.loss = value / 100;
  if (std::sscanf(line, "down %zu", &host) == 1) net.is_down.at(host - 1) = true;
  if (std::sscanf(line, "up %zu", &host) == 1) net.is_down.at(host - 1) = false;
  std::puts("ok");
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** names) {
  setpriority(PRIO_PROCESS, 0, -20);  // the links must not wait for the hosts' computing
  Network net;
  for (int i = 1; i < count; ++i) net.devices.push_back(open_device(names[i]));
  const size_t hosts = net.devices.size();
  net.is_down.assign(hosts, false);
  net.links.assign(hosts, std::vector<Link>(hosts));
  std::vector<pollfd> watched;
  for (const int device : net.devices) watched.push_back({device, POLLIN, 0});
  watched.push_back({STDIN_FILENO, POLLIN, 0});
  std::puts("ready");
  std::fflush(stdout);
  for (std::string line;;) {
    const double wait = std::max(0.0, deliver(net, now() + 1.0) - now());
    const timespec limit{static_cast<time_t>(wait), static_cast<long>((wait - static_cast<time_t>(wait)) * 1e9)};
    ppoll(watched.data(), watched.size(), &limit, nullptr);
    for (size_t i = 0; i < hosts; ++i)
      if (watched[i].revents & POLLIN) take(net, i);
    if (!watched[hosts].revents) continue;
    char letter = 0;
    if (read(STDIN_FILENO, &letter, 1) <= 0) return 0;
    if (letter != '\n') {
      line += letter;
      continue;
    }
    obey(net, line.c_str());
    line.clear();
  }
}
