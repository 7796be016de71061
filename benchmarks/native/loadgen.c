// Hold many WebSockets to one server, publish to them, and check what arrives.
//
// In:     options (`loadgen --help`); a template of one publication, as bytes to be written to a TCP socket
// Out:    one JSON object on stdout; exit status 1 if anything was lost, doubled, out of order or closed
// Owns:   all client sockets, the publishing socket, every clock: a latency is from just before the write of the
//         publication to just after the read that brought it, both here
// Never:  speaks one server's language: what it says is given as text; waits without a bound (`--timeout`)
//
// Each payload carries a mark: `~S`, 8 digits of sequence, 8 of channel, 16 of CLOCK_MONOTONIC in nanoseconds. The
// template has the bytes 1, 2, 3 and 4, at least 8 times, where digits of channel, sequence, time and a number unique to
// the publication go.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MARK 34
#define READ_BYTES (1 << 20)
#define EVENTS 512
#define MAX_PIDS 16
#define KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

enum state { CONNECTING, HANDSHAKE, WAITING, READY, CLOSED };

struct order {
    uint32_t next;   // 0: whatever comes first
    uint32_t target; // `next` once the client has caught up; 0 = it has
    uint64_t seen; // bit i: next - 1 - i has arrived
};

struct conn {
    int fd;
    uint32_t index;
    enum state state;
    uint32_t acked;
    uint32_t rest_size;
    char *rest; // a frame that has not arrived whole, or the end of a stream that may hold half a mark
    uint32_t tail_size;
    char *tail;
    uint64_t began;
    struct order *orders;
};

// A histogram with 1/32 of resolution, 1 ns to 584 years.
struct histogram {
    uint64_t count, max;
    uint64_t buckets[64 * 32];
};

static struct {
    const char *address, *path, *hello, *item, *joiner, *ready, *ping, *pong, *headers, *publish_hello, *reply_error;
    const char *template_file, *positions_file, *mode;
    int port, publish_port, sources, opcode;
    uint32_t connections, channels, per_connection, window, burst, pingers, warm_up, replay;
    uint32_t reply_lines, most_messages;
    double seconds, settle, timeout, rate, ping_every, nap;
    bool stream, ready_each, hold, from_anywhere;
    int pids[MAX_PIDS], pid_count, beside[MAX_PIDS], beside_count;
    bool stops;
} options = {
    .address = "127.0.0.1", .path = "/", .hello = "", .item = "", .joiner = ",", .ready = "", .ping = "", .pong = "",
    .headers = "", .publish_hello = "", .reply_error = "", .mode = "lockstep", .sources = 4, .opcode = 1,
    .connections = 1, .channels = 1, .per_connection = 1, .window = 100, .burst = 1, .warm_up = 3, .seconds = 2,
    .settle = 0.2, .timeout = 10, .rate = 20, .ping_every = 0.1, .most_messages = UINT32_MAX,
};

static int epoll_fd;
static struct conn *conns;
static uint32_t conn_count, started, ready_count, closed_count, failed_count;
static uint64_t behind_count; // orders that have not reached their target
static char *buffer;

static struct {
    uint64_t deliveries, bytes, skipped, doubled, misordered, foreign, publish_errors, replies, expected, answered;
} total;
static struct histogram latency, connecting, bursts, pings;
static bool is_measuring;

static struct {
    int fd;
    char *template;
    size_t size;
    char *out;
    size_t out_size, out_sent, out_capacity;
    uint32_t *sequence; // by channel: of the last publication
    uint32_t *listeners;
    uint64_t number;
    bool wants_out, line_begins;
} publisher = {.fd = -1, .line_begins = true};

struct field { size_t offset, width; char kind; };
static struct field fields[256];
static int field_count;

static uint64_t idle_ns, busy_ns;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "loadgen: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    for (int i = 0; i < options.pid_count; i++)
        if (options.stops) kill(options.pids[i], SIGCONT);
    exit(2);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

static uint64_t own_cpu(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

// --- histograms

static void record_many(struct histogram *histogram, uint64_t value, uint64_t count) {
    uint32_t index;
    if (value < 64) {
        index = value;
    } else {
        uint32_t shift = 58 - __builtin_clzll(value); // leaves 32 .. 63
        index = shift * 32 + (value >> shift);
    }
    histogram->buckets[index] += count;
    histogram->count += count;
    if (value > histogram->max) histogram->max = value;
}

static void record(struct histogram *histogram, uint64_t value) { record_many(histogram, value, 1); }

static double quantile_ms(const struct histogram *histogram, double share) {
    uint64_t wanted = share * histogram->count, sum = 0;
    for (uint32_t i = 0; i < 64 * 32; i++) {
        sum += histogram->buckets[i];
        if (sum > wanted) {
            if (i < 64) return i / 1e6;
            uint32_t shift = i / 32 - 1;
            uint64_t high = ((uint64_t)(i % 32 + 32) << shift) + ((1ull << shift) - 1);
            return (high > histogram->max ? histogram->max : high) / 1e6;
        }
    }
    return histogram->max / 1e6;
}

static void print_histogram(const char *name, const struct histogram *h) {
    if (h->count == 0) return;
    printf(",\"%s\":{\"count\":%lu,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"max\":%.3f}", name, h->count,
           quantile_ms(h, 0.5), quantile_ms(h, 0.9), quantile_ms(h, 0.99), quantile_ms(h, 0.999), h->max / 1e6);
}

// --- digits

static uint32_t eight_digits(const char *text) {
    uint64_t value;
    memcpy(&value, text, 8);
    value = (value & 0x0F0F0F0F0F0F0F0Full) * 2561 >> 8;
    value = (value & 0x00FF00FF00FF00FFull) * 6553601 >> 16;
    return (value & 0x0000FFFF0000FFFFull) * 42949672960001ull >> 32;
}

static void put_digits(char *text, size_t width, uint64_t value) {
    while (width-- > 0) {
        text[width] = '0' + value % 10;
        value /= 10;
    }
}

// --- text with {channel}, {items}, {position}

static char **positions;
static uint32_t *first_sequences;

static char *substitute(const char *template, const char *name, const char *value) {
    size_t found = 0, name_size = strlen(name), value_size = strlen(value);
    for (const char *at = template; (at = strstr(at, name)); at += name_size) found++;
    char *result = malloc(strlen(template) + found * value_size + 1), *to = result;
    for (const char *at = template;;) {
        const char *next = strstr(at, name);
        if (!next) {
            strcpy(to, at);
            return result;
        }
        memcpy(to, at, next - at);
        to += next - at;
        memcpy(to, value, value_size);
        to += value_size;
        at = next + name_size;
    }
}

static uint32_t channel_of(const struct conn *conn, uint32_t number) {
    if (conn->index >= options.connections) return options.channels; // a pinger: nobody publishes there
    return ((uint64_t)conn->index * options.per_connection + number) % options.channels;
}

static uint32_t channels_of(const struct conn *conn) {
    return conn->index >= options.connections ? 1 : options.per_connection;
}

static char *about_channel(const char *template, uint32_t channel) {
    char digits[16];
    snprintf(digits, sizeof digits, "%08u", channel);
    char *text = substitute(template, "{channel}", digits);
    const char *position = positions && channel < options.channels ? positions[channel] : "null";
    char *whole = substitute(text, "{position}", position);
    free(text);
    return whole;
}

static char *hello_of(const struct conn *conn) {
    size_t size = 1, capacity = 256;
    char *items = malloc(capacity);
    items[0] = 0;
    for (uint32_t i = 0; i < channels_of(conn); i++) {
        char *item = about_channel(options.item, channel_of(conn, i));
        size += strlen(item) + strlen(options.joiner);
        if (size > capacity) items = realloc(items, capacity = size * 2);
        if (i) strcat(items, options.joiner);
        strcat(items, item);
        free(item);
    }
    char *text = substitute(options.hello, "{items}", items);
    char *whole = about_channel(text, channel_of(conn, 0));
    free(items);
    free(text);
    return whole;
}

// --- sockets

static void watch(int fd, uint32_t events, uint64_t data, int operation) {
    struct epoll_event event = {.events = events, .data.u64 = data};
    if (epoll_ctl(epoll_fd, operation, fd, &event)) fail("epoll_ctl: %s", strerror(errno));
}

static void close_conn(struct conn *conn, bool is_failure) {
    if (conn->state == CLOSED) return;
    if (is_failure || conn->state != READY) failed_count += conn->state != READY;
    if (conn->state == READY) closed_count++, ready_count--;
    conn->state = CLOSED;
    close(conn->fd);
}

static void send_frame(struct conn *conn, int opcode, const char *data, size_t size) {
    static const unsigned char mask[4] = {0x5a, 0xc3, 0x17, 0x8e};
    unsigned char frame[14 + size];
    size_t head = 2;
    frame[0] = 0x80 | opcode;
    if (size < 126) {
        frame[1] = 0x80 | size;
    } else {
        if (size > 65535) fail("what a client says must be shorter than 64 KiB");
        frame[1] = 0x80 | 126;
        frame[2] = size >> 8;
        frame[3] = size;
        head = 4;
    }
    memcpy(frame + head, mask, 4);
    for (size_t i = 0; i < size; i++) frame[head + 4 + i] = data[i] ^ mask[i % 4];
    if (write(conn->fd, frame, head + 4 + size) != (ssize_t)(head + 4 + size)) close_conn(conn, true);
}

static void start_one(void) {
    struct conn *conn = &conns[started];
    conn->index = started++;
    conn->state = CONNECTING;
    conn->began = now();
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0) fail("socket %u: %s (the limit of open files is `ulimit -n`)", conn->index, strerror(errno));
    int yes = 1;
    setsockopt(conn->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(options.port)};
    from.sin_addr.s_addr = htonl(0x7f000002 + conn->index % options.sources);
    inet_pton(AF_INET, options.address, &to.sin_addr);
    if (bind(conn->fd, (struct sockaddr *)&from, sizeof from)) fail("bind: %s", strerror(errno));
    if (connect(conn->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    watch(conn->fd, EPOLLOUT, conn->index, EPOLL_CTL_ADD);
}

static void send_handshake(struct conn *conn) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        close_conn(conn, true);
        return;
    }
    char *path = about_channel(options.path, channel_of(conn, 0)), *request;
    int length = asprintf(&request,
                          "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          "Sec-WebSocket-Key: " KEY "\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                          path, options.address, options.port, options.headers);
    conn->state = HANDSHAKE;
    watch(conn->fd, EPOLLIN, conn->index, EPOLL_CTL_MOD);
    if (write(conn->fd, request, length) != length) close_conn(conn, true);
    free(request);
    free(path);
}

// --- what arrives

static void became_ready(struct conn *conn, uint64_t at) {
    conn->state = READY;
    ready_count++;
    record(&connecting, at - conn->began);
}

static void take_mark(struct conn *conn, const char *mark, uint64_t at) {
    uint32_t sequence = eight_digits(mark + 2), channel = eight_digits(mark + 10);
    uint64_t sent = (uint64_t)eight_digits(mark + 18) * 100000000u + eight_digits(mark + 26);
    uint32_t slot = 0;
    if (options.per_connection > 1) {
        uint32_t first = channel_of(conn, 0);
        slot = channel >= first ? channel - first : channel + options.channels - first;
    } else if (channel != channel_of(conn, 0)) {
        slot = UINT32_MAX;
    }
    if (slot >= channels_of(conn) || channel >= options.channels) {
        total.foreign++;
        return;
    }
    struct order *order = &conn->orders[slot];
    if (__builtin_expect(sequence == order->next || !order->next, 1)) {
        order->next = sequence;
        order->seen = order->seen << 1 | 1;
        order->next++;
    } else if (sequence > order->next) {
        uint32_t jump = sequence - order->next + 1;
        total.skipped += jump - 1;
        order->seen = jump < 64 ? order->seen << jump | 1 : 1;
        order->next = sequence + 1;
    } else {
        uint32_t age = order->next - 1 - sequence;
        if (age >= 64 || order->seen >> age & 1) {
            total.doubled++;
            return;
        }
        order->seen |= 1ull << age;
        total.misordered++;
        total.skipped--;
    }
    if (__builtin_expect(order->target && order->next >= order->target, 0)) {
        order->target = 0;
        behind_count--;
    }
    total.deliveries++;
    if (is_measuring) record(&latency, at % 10000000000000000u - sent);
}

static void take_marks(struct conn *conn, const char *data, size_t size, uint64_t at) {
    // Frames of one server look alike: where the mark was last time, it mostly is again.
    static size_t usual;
    if (!options.stream) {
        if (usual + MARK <= size && data[usual] == '~' && data[usual + 1] == 'S') {
            take_mark(conn, data + usual, at);
            return;
        }
        const char *mark = memmem(data, size, "~S", 2);
        if (mark && mark + MARK <= data + size) {
            usual = mark - data;
            take_mark(conn, mark, at);
            return;
        }
    } else {
        char *joined = NULL;
        if (conn->tail_size) {
            joined = malloc(conn->tail_size + size);
            memcpy(joined, conn->tail, conn->tail_size);
            memcpy(joined + conn->tail_size, data, size);
            data = joined;
            size += conn->tail_size;
        }
        const char *from = data, *end = data + size, *mark;
        bool found = false;
        while ((mark = memmem(from, end - from, "~S", 2)) && mark + MARK <= end) {
            take_mark(conn, mark, at);
            from = mark + MARK;
            found = true;
        }
        size_t left = end - from < MARK - 1 ? end - from : MARK - 1;
        if (!conn->tail) conn->tail = malloc(MARK);
        memcpy(conn->tail, end - left, left);
        conn->tail_size = left;
        free(joined);
        if (found) return;
        data = end - size;
    }
}

static void take_message(struct conn *conn, int opcode, const char *data, size_t size, uint64_t at) {
    if (opcode == 8) {
        close_conn(conn, false);
    } else if (opcode == 9) {
        total.answered++;
        send_frame(conn, 10, data, size);
    } else if (opcode == 10) {
        if (size == 16 && is_measuring) {
            uint64_t sent = (uint64_t)eight_digits(data) * 100000000u + eight_digits(data + 8);
            record(&pings, at % 10000000000000000u - sent);
        }
    } else {
        if (__builtin_expect(conn->state == WAITING, 0) && *options.ready) {
            size_t length = strlen(options.ready);
            const char *found = memmem(data, size, options.ready, length);
            if (found && ++conn->acked == (options.ready_each ? channels_of(conn) : 1)) became_ready(conn, at);
            if (found && !options.stream) return;
        }
        if (*options.ping && size < 128) {
            size_t length = strlen(options.ping);
            if (options.stream ? memmem(data, size, options.ping, length) != NULL
                               : size == length && !memcmp(data, options.ping, length)) {
                total.answered++;
                send_frame(conn, options.opcode, options.pong, strlen(options.pong));
                return;
            }
        }
        total.bytes += size;
        take_marks(conn, data, size, at);
    }
}

// Returns how many bytes of `data` were whole frames.
static size_t take_frames(struct conn *conn, const char *data, size_t size, uint64_t at) {
    size_t done = 0;
    while (size - done >= 2 && conn->state != CLOSED) {
        const unsigned char *head = (const unsigned char *)data + done;
        size_t length = head[1] & 0x7f, head_size = 2;
        if (length == 126) {
            if (size - done < 4) break;
            length = head[2] << 8 | head[3];
            head_size = 4;
        } else if (length == 127) {
            if (size - done < 10) break;
            length = 0;
            for (int i = 2; i < 10; i++) length = length << 8 | head[i];
            head_size = 10;
        }
        if (head[1] & 0x80) fail("a frame from the server is masked");
        if (length + head_size > READ_BYTES / 2) fail("a frame of %zu bytes", length);
        if (size - done < head_size + length) break;
        take_message(conn, head[0] & 15, data + done + head_size, length, at);
        done += head_size + length;
    }
    return conn->state == CLOSED ? size : done;
}

static size_t take_handshake(struct conn *conn, char *data, size_t size, uint64_t at) {
    char *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end) return 0;
    if (size < 12 || memcmp(data + 8, " 101", 4) || !memmem(data, end - data, ACCEPT, strlen(ACCEPT))) {
        static bool was_told;
        if (!was_told) fprintf(stderr, "loadgen: handshake refused: %.*s\n", (int)(end - data), data);
        was_told = true;
        close_conn(conn, true);
        return size;
    }
    conn->state = WAITING;
    char *hello = hello_of(conn);
    if (*hello) send_frame(conn, options.opcode, hello, strlen(hello));
    free(hello);
    if (!*options.ready && conn->state == WAITING) became_ready(conn, at);
    return end + 4 - data;
}

static void readable(struct conn *conn) {
    size_t size = conn->rest_size;
    if (size) memcpy(buffer, conn->rest, size);
    ssize_t got = read(conn->fd, buffer + size, READ_BYTES - size);
    uint64_t at = now();
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) return;
        close_conn(conn, true);
        return;
    }
    size += got;
    size_t done = 0;
    if (conn->state == HANDSHAKE) {
        done = take_handshake(conn, buffer, size, at);
        if (!done && size > 65536) fail("the answer to a handshake has no end");
    }
    if (conn->state != HANDSHAKE && done < size) done += take_frames(conn, buffer + done, size - done, at);
    size_t left = size - done;
    if (left) {
        if (left > conn->rest_size || !conn->rest) conn->rest = realloc(conn->rest, left);
        memcpy(conn->rest, buffer + done, left);
    } else if (conn->rest) {
        free(conn->rest);
        conn->rest = NULL;
    }
    conn->rest_size = left;
}

// --- publishing

static void load_template(void) {
    FILE *file = fopen(options.template_file, "rb");
    if (!file) fail("%s: %s", options.template_file, strerror(errno));
    publisher.template = malloc(1 << 21);
    publisher.size = fread(publisher.template, 1, 1 << 21, file);
    fclose(file);
    for (size_t i = 0; i < publisher.size;) {
        char kind = publisher.template[i];
        size_t width = 1;
        if (kind < 1 || kind > 4) {
            i++;
            continue;
        }
        while (i + width < publisher.size && publisher.template[i + width] == kind) width++;
        if (field_count == 256) fail("the template has too many places");
        // Shorter ones are bytes of the server's own protocol.
        if (width >= 8) fields[field_count++] = (struct field){i, width, kind};
        i += width;
    }
    publisher.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(options.publish_port)};
    inet_pton(AF_INET, options.address, &to.sin_addr);
    if (connect(publisher.fd, (struct sockaddr *)&to, sizeof to)) fail("publishing to port %d: %s", options.publish_port, strerror(errno));
    int yes = 1;
    setsockopt(publisher.fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (*options.publish_hello &&
        write(publisher.fd, options.publish_hello, strlen(options.publish_hello)) < 0)
        fail("publishing: %s", strerror(errno));
    fcntl(publisher.fd, F_SETFL, O_NONBLOCK);
    watch(publisher.fd, EPOLLIN, UINT64_MAX, EPOLL_CTL_ADD);
    publisher.sequence = calloc(options.channels, sizeof *publisher.sequence);
    publisher.listeners = calloc(options.channels, sizeof *publisher.listeners);
    for (uint32_t i = 0; i < options.channels; i++) publisher.sequence[i] = first_sequences ? first_sequences[i] - 1 + options.replay : 0;
    for (uint32_t i = 0; i < options.connections; i++)
        for (uint32_t j = 0; j < options.per_connection; j++) publisher.listeners[channel_of(&conns[i], j)]++;
}

static void append_publication(uint32_t channel) {
    size_t needed = publisher.out_size + publisher.size;
    if (needed > publisher.out_capacity)
        publisher.out = realloc(publisher.out, publisher.out_capacity = needed * 2);
    char *text = publisher.out + publisher.out_size;
    memcpy(text, publisher.template, publisher.size);
    publisher.sequence[channel]++;
    publisher.number++;
    uint64_t values[5] = {0, channel, publisher.sequence[channel], now(), publisher.number};
    for (int i = 0; i < field_count; i++)
        put_digits(text + fields[i].offset, fields[i].width, values[(int)fields[i].kind]);
    publisher.out_size = needed;
    total.expected += publisher.listeners[channel];
}

// Returns whether all is written.
static bool flush_publications(void) {
    while (publisher.out_sent < publisher.out_size) {
        ssize_t sent = write(publisher.fd, publisher.out + publisher.out_sent, publisher.out_size - publisher.out_sent);
        if (sent < 0) {
            if (errno != EAGAIN) fail("publishing: %s", strerror(errno));
            if (!publisher.wants_out) watch(publisher.fd, EPOLLIN | EPOLLOUT, UINT64_MAX, EPOLL_CTL_MOD);
            publisher.wants_out = true;
            return false;
        }
        publisher.out_sent += sent;
    }
    publisher.out_size = publisher.out_sent = 0;
    if (publisher.wants_out) watch(publisher.fd, EPOLLIN, UINT64_MAX, EPOLL_CTL_MOD);
    publisher.wants_out = false;
    return true;
}

static void take_replies(void) {
    ssize_t got = read(publisher.fd, buffer, READ_BYTES - 1);
    if (got == 0) fail("the server closed the connection for publishing");
    if (got < 0) return;
    buffer[got] = 0;
    size_t length = strlen(options.reply_error);
    for (char *at = buffer; at < buffer + got;) {
        if (publisher.line_begins && length && !strncmp(at, options.reply_error, length)) {
            if (!total.publish_errors++) fprintf(stderr, "loadgen: publishing: %.*s\n", (int)strcspn(at, "\r\n"), at);
        }
        char *end = memchr(at, '\n', buffer + got - at);
        publisher.line_begins = end != NULL;
        if (!end) break;
        total.replies++;
        at = end + 1;
    }
}

// --- the loop

static uint64_t next_ping;
static uint32_t ping_turn;

// Pings are spread: each of the pingers once per `ping_every`.
static void send_pings(uint64_t at) {
    uint64_t step = options.ping_every * 1e9 / options.pingers;
    while (next_ping <= at) {
        struct conn *conn = &conns[options.connections + ping_turn++ % options.pingers];
        char digits[16];
        put_digits(digits, 16, next_ping); // when it was due: a loop that is late must not hide what it missed
        if (conn->state == READY) send_frame(conn, 9, digits, 16);
        next_ping += step;
    }
}

// Sleeps a little, so that the next turn finds more to read. A server's write to a socket whose reader sleeps in
// `epoll_wait` has to wake it, which costs both more than the delivery itself; to a client far away it would not.
static void nap(void) {
    struct timespec time = {0, options.nap * 1000};
    uint64_t before = now();
    nanosleep(&time, NULL);
    idle_ns += now() - before;
}

static void turn(uint64_t deadline) {
    static struct epoll_event events[EVENTS];
    if (options.pingers && is_measuring && next_ping < deadline) deadline = next_ping;
    uint64_t before = now();
    struct timespec wait = {0, 0};
    if (deadline > before) {
        wait.tv_sec = (deadline - before) / 1000000000u;
        wait.tv_nsec = (deadline - before) % 1000000000u;
    }
    int count = epoll_pwait2(epoll_fd, events, EVENTS, &wait, NULL);
    uint64_t after = now();
    idle_ns += after - before;
    if (count < 0 && errno != EINTR) fail("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++) {
        uint64_t data = events[i].data.u64;
        if (data == UINT64_MAX) {
            if (events[i].events & EPOLLOUT) flush_publications();
            if (events[i].events & ~EPOLLOUT) take_replies();
        } else if (data == UINT64_MAX - 1) {
            if (read(0, buffer, READ_BYTES) <= 0) options.hold = false;
        } else {
            struct conn *conn = &conns[data];
            if (conn->state == CLOSED) continue;
            if (conn->state == CONNECTING) send_handshake(conn);
            else readable(conn);
        }
    }
    if (options.pingers && is_measuring) send_pings(now());
    if (options.nap && is_measuring && count > 0 && count < 64 && total.deliveries < total.expected) nap();
}

static void say_shortfall(const char *what) {
    fprintf(stderr, "loadgen: %s did not end within %g s: %u of %u subscribed, %lu of %lu delivered\n", what,
            options.timeout, ready_count, conn_count, total.deliveries, total.expected);
}

static double connect_seconds, caught_up_seconds;

static bool connect_all(void) {
    uint64_t began = now(), deadline = began + options.timeout * 1e9;
    bool was_ready = false;
    for (;;) {
        while (started < conn_count && started - ready_count - closed_count - failed_count < options.window) start_one();
        if (!was_ready && ready_count + closed_count + failed_count == conn_count) {
            was_ready = true;
            connect_seconds = (now() - began) / 1e9;
        }
        if (was_ready && (!behind_count || failed_count + closed_count)) break;
        uint64_t at = now();
        if (at > deadline) {
            say_shortfall("connecting");
            return false;
        }
        turn(at + 100000000u);
    }
    caught_up_seconds = (now() - began) / 1e9;
    return failed_count + closed_count == 0;
}

static void rest(double seconds) {
    for (uint64_t end = now() + seconds * 1e9, at; (at = now()) < end;) turn(end);
}

static void stop_server(void) {
    for (int i = 0; i < options.pid_count; i++)
        if (kill(options.pids[i], SIGSTOP)) fail("kill %d: %s", options.pids[i], strerror(errno));
    for (int i = 0; i < options.pid_count; i++) {
        char path[64], line[256] = "";
        snprintf(path, sizeof path, "/proc/%d/stat", options.pids[i]);
        for (int tries = 0; tries < 100000; tries++) {
            FILE *file = fopen(path, "r");
            if (!file || !fgets(line, sizeof line, file)) fail("process %d is gone", options.pids[i]);
            fclose(file);
            char *state = strrchr(line, ')');
            if (state && state[2] == 'T') break;
            if (tries == 99999) fail("process %d does not stop", options.pids[i]);
        }
    }
}

static void continue_server(void) {
    for (int i = 0; i < options.pid_count; i++) kill(options.pids[i], SIGCONT);
}

// One channel after the other, in an order in which neighbours belong to different connections: else what one connection
// gets of a burst could be joined.
static uint32_t take_channel(void) {
    static uint32_t next, first;
    uint32_t taken = next;
    next += options.per_connection;
    if (next >= options.channels) next = first = (first + 1) % options.per_connection;
    return taken;
}

// Publishes a burst, and waits until all of it has arrived. Returns nanoseconds, or 0 if it did not.
static uint64_t run_burst(void) {
    uint64_t replies = total.replies + (uint64_t)options.reply_lines * options.burst, idle_before = idle_ns;
    if (options.stops) stop_server();
    uint64_t busy_before = own_cpu(), began = now(), deadline = began + options.timeout * 1e9;
    for (uint32_t i = 0; i < options.burst; i++) {
        append_publication(take_channel());
    }
    flush_publications();
    if (options.stops) {
        // Where the stopped server takes publications itself, they wait in its socket, as far as there is room.
        while (options.reply_lines && total.replies < replies && now() < began + 2000000000u) turn(now() + 10000000u);
        idle_ns = idle_before;
        busy_before = own_cpu();
        began = now();
        continue_server();
    }
    while (total.deliveries < total.expected) {
        uint64_t at = now();
        if (at > deadline || closed_count) {
            say_shortfall("a burst");
            return 0;
        }
        turn(deadline);
    }
    busy_ns += own_cpu() - busy_before;
    return now() - began;
}

// --- what the processes used

static double cpu_of(const int *pids, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "/proc/%d/task", pids[i]);
        DIR *tasks = opendir(path);
        if (!tasks) continue;
        for (struct dirent *task; (task = readdir(tasks));) {
            if (task->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "/proc/%d/task/%.20s/schedstat", pids[i], task->d_name);
            FILE *file = fopen(path, "r");
            unsigned long spent = 0;
            if (file && fscanf(file, "%lu", &spent) == 1) sum += spent / 1e9;
            if (file) fclose(file);
        }
        closedir(tasks);
    }
    return sum;
}

struct usage {
    double at, servers, own, beside, busy;
};

// Seconds that all cores were busy, with whatever else the machine does.
static double machine_busy(void) {
    FILE *file = fopen("/proc/stat", "r");
    unsigned long v[8] = {0};
    if (file && fscanf(file, "cpu %lu %lu %lu %lu %lu %lu %lu %lu", v, v + 1, v + 2, v + 3, v + 4, v + 5, v + 6, v + 7) != 8)
        v[0] = 0;
    if (file) fclose(file);
    return (double)(v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / sysconf(_SC_CLK_TCK);
}

static struct usage used_until_now(void) {
    return (struct usage){now() / 1e9, cpu_of(options.pids, options.pid_count), own_cpu() / 1e9,
                          cpu_of(options.beside, options.beside_count), machine_busy()};
}

// --- options

static void read_positions(void) {
    FILE *file = fopen(options.positions_file, "r");
    if (!file) fail("%s: %s", options.positions_file, strerror(errno));
    positions = calloc(options.channels, sizeof *positions);
    first_sequences = calloc(options.channels, sizeof *first_sequences);
    for (uint32_t i = 0; i < options.channels; i++) {
        char position[512];
        if (fscanf(file, "%511s %u", position, &first_sequences[i]) != 2) fail("%s is too short", options.positions_file);
        positions[i] = strdup(position);
    }
    fclose(file);
}

static const char *usage =
    "Hold many WebSockets to one server, publish to them, and check what arrives. Prints one JSON object.\n"
    "\n"
    "  --port N                  of the server                --address A      [127.0.0.1]\n"
    "  --connections N           [1]                          --sources N      addresses to call from [4]\n"
    "  --channels N              [1]                          --per-connection N  channels of each [1]\n"
    "  --window N                handshakes under way [100]   --timeout S      for each step [10]\n"
    "\n"
    "What a client says; {channel} is 8 digits, {position} comes from the file, {items} is --item per channel:\n"
    "  --path TEXT  --header 'Name: value' (again and again)  --hello TEXT  --item TEXT  --joiner TEXT [,]\n"
    "  --ready TEXT              what the server says when a client is subscribed; none = after the handshake\n"
    "  --ready-each              once per channel             --ping TEXT --pong TEXT  the dialect's own, if any\n"
    "  --binary                  says it in binary frames     --stream         a frame may hold several deliveries\n"
    "  --positions FILE          per channel: its position and the sequence that follows\n"
    "  --replay N                publications that follow it, which each client must get before it has caught up\n"
    "  --from-anywhere           clients have no position, and somebody else publishes: begin with what comes first\n"
    "\n"
    "Publishing:\n"
    "  --publish-port N  --publish-template FILE  --publish-hello TEXT\n"
    "  --reply-lines N           of each answer [0 = none]    --reply-error TEXT  how a bad one begins\n"
    "\n"
    "  --mode lockstep           the next burst when the last has arrived everywhere (default)\n"
    "  --mode rate               --rate N bursts per second, whatever arrives [20]\n"
    "  --mode hold               subscribe, print a line, go on until stdin is closed\n"
    "  --mode connect            subscribe and end\n"
    "  --mode ping               subscribe, and let the --pingers ping for --seconds\n"
    "  --burst N                 publications at once, channel after channel [1]\n"
    "  --seconds S               [2]   --messages N  at most   --warm-up N  bursts before [3]   --settle S  [0.2]\n"
    "  --pingers N               more connections, each of which pings every --ping-every S [0.1]\n"
    "  --nap MICROSECONDS        between two looks for deliveries, so that the server need not wake us for each [0]\n"
    "  --pid N                   of a server process, for its CPU time; again for more\n"
    "  --beside PID              of what else belongs to the measurement, such as Redis; the rest is `others_share`\n"
    "  --stop                    SIGSTOP them while a burst is published: all of it waits\n";

static void parse(int count, char **arguments) {
    enum { HELP = 1000, ADDRESS, PORT, CONNECTIONS, SOURCES, CHANNELS, PER, WINDOW, TIMEOUT, PATH, HEADER, HELLO, ITEM,
           JOINER, READY_TEXT, READY_EACH, PING, PONG, BINARY, STREAM, POSITIONS, REPLAY, PUBLISH_PORT, TEMPLATE,
           PUBLISH_HELLO, REPLY_LINES, REPLY_ERROR, MODE, RATE, BURST, SECONDS, MESSAGES, WARM_UP, SETTLE, PINGERS,
           PING_EVERY, PID, STOP, NAP, BESIDE, ANYWHERE };
#define ARG(name, value) {name, required_argument, 0, value}
#define FLAG(name, value) {name, no_argument, 0, value}
    static const struct option known[] = {
        FLAG("help", HELP), ARG("address", ADDRESS), ARG("port", PORT), ARG("connections", CONNECTIONS),
        ARG("sources", SOURCES), ARG("channels", CHANNELS), ARG("per-connection", PER), ARG("window", WINDOW),
        ARG("timeout", TIMEOUT), ARG("path", PATH), ARG("header", HEADER), ARG("hello", HELLO), ARG("item", ITEM),
        ARG("joiner", JOINER), ARG("ready", READY_TEXT), FLAG("ready-each", READY_EACH), ARG("ping", PING),
        ARG("pong", PONG), FLAG("binary", BINARY), FLAG("stream", STREAM), ARG("positions", POSITIONS),
        ARG("replay", REPLAY), ARG("publish-port", PUBLISH_PORT), ARG("publish-template", TEMPLATE),
        ARG("publish-hello", PUBLISH_HELLO), ARG("reply-lines", REPLY_LINES), ARG("reply-error", REPLY_ERROR),
        ARG("mode", MODE), ARG("rate", RATE), ARG("burst", BURST), ARG("seconds", SECONDS), ARG("messages", MESSAGES),
        ARG("warm-up", WARM_UP), ARG("settle", SETTLE), ARG("pingers", PINGERS), ARG("ping-every", PING_EVERY),
        ARG("pid", PID), FLAG("stop", STOP), ARG("nap", NAP), ARG("beside", BESIDE),
        FLAG("from-anywhere", ANYWHERE), {0}};
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;) {
        switch (option) {
        case HELP: printf("%s", usage); exit(0);
        case ADDRESS: options.address = optarg; break;
        case PORT: options.port = atoi(optarg); break;
        case CONNECTIONS: options.connections = atoi(optarg); break;
        case SOURCES: options.sources = atoi(optarg); break;
        case CHANNELS: options.channels = atoi(optarg); break;
        case PER: options.per_connection = atoi(optarg); break;
        case WINDOW: options.window = atoi(optarg); break;
        case TIMEOUT: options.timeout = atof(optarg); break;
        case PATH: options.path = optarg; break;
        case HEADER: {
            char *headers;
            if (asprintf(&headers, "%s%s\r\n", options.headers, optarg) > 0) options.headers = headers;
            break;
        }
        case HELLO: options.hello = optarg; break;
        case ITEM: options.item = optarg; break;
        case JOINER: options.joiner = optarg; break;
        case READY_TEXT: options.ready = optarg; break;
        case READY_EACH: options.ready_each = true; break;
        case PING: options.ping = optarg; break;
        case PONG: options.pong = optarg; break;
        case BINARY: options.opcode = 2; break;
        case STREAM: options.stream = true; break;
        case POSITIONS: options.positions_file = optarg; break;
        case REPLAY: options.replay = atoi(optarg); break;
        case PUBLISH_PORT: options.publish_port = atoi(optarg); break;
        case TEMPLATE: options.template_file = optarg; break;
        case PUBLISH_HELLO: options.publish_hello = optarg; break;
        case REPLY_LINES: options.reply_lines = atoi(optarg); break;
        case REPLY_ERROR: options.reply_error = optarg; break;
        case MODE: options.mode = optarg; break;
        case RATE: options.rate = atof(optarg); break;
        case BURST: options.burst = atoi(optarg); break;
        case SECONDS: options.seconds = atof(optarg); break;
        case MESSAGES: options.most_messages = atoi(optarg); break;
        case WARM_UP: options.warm_up = atoi(optarg); break;
        case SETTLE: options.settle = atof(optarg); break;
        case PINGERS: options.pingers = atoi(optarg); break;
        case PING_EVERY: options.ping_every = atof(optarg); break;
        case PID:
            if (options.pid_count == MAX_PIDS) fail("at most %d processes", MAX_PIDS);
            options.pids[options.pid_count++] = atoi(optarg);
            break;
        case BESIDE:
            if (options.beside_count == MAX_PIDS) fail("at most %d processes", MAX_PIDS);
            options.beside[options.beside_count++] = atoi(optarg);
            break;
        case ANYWHERE: options.from_anywhere = true; break;
        case NAP: options.nap = atof(optarg); break;
        case STOP: options.stops = true; break;
        default: exit(2);
        }
    }
    if (!options.port) fail("--port is needed; see --help");
    if (!options.channels || !options.per_connection || options.per_connection > options.channels || !options.burst)
        fail("--channels, --per-connection and --burst are at least 1, and a connection has each channel once");
}

int main(int count, char **arguments) {
    parse(count, arguments);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1);
    bool publishes = !strcmp(options.mode, "lockstep") || !strcmp(options.mode, "rate");
    bool pings_alone = !strcmp(options.mode, "ping");
    if (!publishes && !pings_alone && strcmp(options.mode, "hold") && strcmp(options.mode, "connect"))
        fail("no mode %s", options.mode);
    if (publishes && !options.template_file) fail("--publish-port and --publish-template are needed");
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    buffer = malloc(READ_BYTES);
    conn_count = options.connections + options.pingers;
    conns = calloc(conn_count, sizeof *conns);
    if (options.positions_file) read_positions();
    for (uint32_t i = 0; i < conn_count; i++) {
        conns[i].index = i;
        conns[i].orders = calloc(channels_of(&conns[i]), sizeof *conns[i].orders);
        for (uint32_t j = 0; j < channels_of(&conns[i]); j++) {
            uint32_t channel = channel_of(&conns[i], j);
            if (channel >= options.channels) continue;
            conns[i].orders[j].next = options.from_anywhere ? 0 : first_sequences ? first_sequences[channel] : 1;
            if (!options.replay) continue;
            conns[i].orders[j].target = conns[i].orders[j].next + options.replay;
            behind_count++;
        }
    }
    bool is_right = connect_all();
    // From here on what is published is counted; how many came before is known only where none may have been missed.
    total.deliveries = 0;
    double wall = 0, idle_share = 0;
    struct usage before = {0}, after = {0};
    uint64_t messages = 0, deliveries = 0;
    if (is_right && publishes) {
        load_template();
        rest(options.settle);
        for (uint32_t i = 0; i < options.warm_up && is_right; i++) is_right = run_burst() != 0;
        uint64_t first = total.deliveries;
        is_measuring = true;
        total.bytes = 0;
        before = used_until_now();
        idle_ns = busy_ns = 0;
        uint64_t began = now(), end = began + options.seconds * 1e9;
        next_ping = began;
        if (is_right && !strcmp(options.mode, "lockstep")) {
            while (now() < end && messages < options.most_messages) {
                uint64_t took = run_burst();
                if (!(is_right = took != 0)) break;
                wall += took / 1e9;
                record(&bursts, took);
                messages += options.burst;
            }
        } else if (is_right) {
            uint64_t step = 1e9 / options.rate, due = began, busy_before = own_cpu();
            while (due < end && messages < options.most_messages) {
                while (now() < due) turn(due);
                for (uint32_t i = 0; i < options.burst; i++) {
                    append_publication(take_channel());
                }
                flush_publications();
                messages += options.burst;
                due += step;
            }
            uint64_t deadline = now() + options.timeout * 1e9;
            while (total.deliveries < total.expected && is_right) {
                if (now() > deadline || closed_count) is_right = false, say_shortfall("the last publications");
                turn(deadline);
            }
            wall = (now() - began) / 1e9;
            busy_ns = own_cpu() - busy_before;
        }
        after = used_until_now();
        deliveries = total.deliveries - first;
        is_measuring = false;
        idle_share = wall ? idle_ns / 1e9 / wall : 0;
        // What comes twice may come late.
        rest(options.settle);
    }
    if (is_right && pings_alone) {
        is_measuring = true;
        next_ping = now();
        rest(options.seconds);
    }
    if (!strcmp(options.mode, "hold")) {
        printf("{\"subscribed\":%u,\"connect_seconds\":%.4f}\n", ready_count, connect_seconds);
        fflush(stdout);
        watch(0, EPOLLIN, UINT64_MAX - 1, EPOLL_CTL_ADD);
        options.hold = true;
        while (options.hold) turn(now() + 1000000000u);
    }
    uint64_t lost = total.expected > total.deliveries ? total.expected - total.deliveries : 0;
    if (lost < total.skipped) lost = total.skipped;
    if (lost || total.doubled || total.misordered || total.foreign || total.publish_errors || closed_count || failed_count)
        is_right = false;
    printf("{\"ok\":%s,\"connections\":%u,\"channels\":%u,\"per_connection\":%u", is_right ? "true" : "false",
           options.connections, options.channels, options.per_connection);
    printf(",\"failed\":%u,\"closed\":%u,\"lost\":%lu,\"doubled\":%lu,\"misordered\":%lu,\"foreign\":%lu", failed_count,
           closed_count, lost, total.doubled, total.misordered, total.foreign);
    printf(",\"publish_errors\":%lu,\"pings_answered\":%lu", total.publish_errors, total.answered);
    printf(",\"connect_seconds\":%.4f,\"connects_per_second\":%.1f,\"caught_up_seconds\":%.4f", connect_seconds,
           connect_seconds ? ready_count / connect_seconds : 0, caught_up_seconds);
    if (wall > 0) {
        printf(",\"messages\":%lu,\"deliveries\":%lu,\"seconds\":%.4f,\"per_second\":%.1f,\"bytes_per_second\":%.0f",
               messages, deliveries, wall, deliveries / wall, total.bytes / wall);
        // Times within the bursts alone; while the server is stopped the load generator is not measured, only busy.
        printf(",\"idle_share\":%.4f,\"cpu_share\":%.4f", idle_share, busy_ns / 1e9 / wall);
        double others = after.busy - before.busy - (after.servers - before.servers) - (after.own - before.own) -
                        (after.beside - before.beside);
        printf(",\"others_share\":%.3f,\"beside_cpu_share\":%.4f", others / (after.at - before.at),
               (after.beside - before.beside) / wall);
        if (options.pid_count && deliveries)
            printf(",\"server_cpu_share\":%.4f,\"server_us_per_delivery\":%.4f", (after.servers - before.servers) / wall,
                   (after.servers - before.servers) * 1e6 / deliveries);
    }
    print_histogram("connect_ms", &connecting);
    print_histogram("latency_ms", &latency);
    print_histogram("burst_ms", &bursts);
    print_histogram("ping_ms", &pings);
    printf("}\n");
    return is_right ? 0 : 1;
}
