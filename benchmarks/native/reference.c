// Deliver publications to WebSockets with as little as a server can do: the measure for all others.
//
// In:     WebSockets that listen to the channel which their path ends with, as 8 digits; publications, on a TCP
//         connection to the same port: `PUB <8 digits of the channel> <size>\n` and as many bytes
// Out:    each publication as a text frame, in one `write` per delivery; with --join in one `write` for all that waits
//         for a socket at the end of a turn
// Owns:   what a socket did not take, without a bound
// Never:  recovers, checks permission, keeps history. It knows the one key that the load generator sends
//
// With --fault it is wrong on purpose, so that a test can see the load generator find out.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define READ_BYTES (1 << 18)
#define EVENTS 512
#define KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define ANSWER                                                                                                        \
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"                               \
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

enum kind { NEW, SOCKET, PUBLISHER };

struct conn {
    int fd;
    enum kind kind;
    uint32_t channel, place;
    bool wants_out, is_touched;
    char *in, *out, *held;
    size_t in_size, out_size, out_sent, out_capacity, held_size;
};

struct channel {
    uint32_t count, capacity;
    struct conn **listeners;
};

static int epoll_fd;
static bool joins;
static char fault;
static uint64_t fault_every, delivery_count;
static struct channel *channels;
static uint32_t channel_count;
static struct conn **touched;
static uint32_t touched_count, touched_capacity;
static char *buffer;

static void watch(struct conn *conn, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = conn};
    epoll_ctl(epoll_fd, operation, conn->fd, &event);
}

static void end(struct conn *conn) {
    if (conn->kind == SOCKET) {
        struct channel *channel = &channels[conn->channel];
        channel->listeners[conn->place] = channel->listeners[--channel->count];
        channel->listeners[conn->place]->place = conn->place;
    }
    for (uint32_t i = 0; conn->is_touched && i < touched_count; i++)
        if (touched[i] == conn) touched[i] = touched[--touched_count];
    close(conn->fd);
    free(conn->in);
    free(conn->out);
    free(conn->held);
    free(conn);
}

static void keep(struct conn *conn, const char *data, size_t size) {
    if (conn->out_size + size > conn->out_capacity)
        conn->out = realloc(conn->out, conn->out_capacity = (conn->out_size + size) * 2);
    memcpy(conn->out + conn->out_size, data, size);
    conn->out_size += size;
}

static void want(struct conn *conn, bool wants) {
    if (wants != conn->wants_out) watch(conn, wants ? EPOLLIN | EPOLLOUT : EPOLLIN, EPOLL_CTL_MOD);
    conn->wants_out = wants;
}

static void flush(struct conn *conn) {
    if (conn->out_sent < conn->out_size) {
        ssize_t sent = write(conn->fd, conn->out + conn->out_sent, conn->out_size - conn->out_sent);
        if (sent > 0) conn->out_sent += sent;
    }
    if (conn->out_sent == conn->out_size) conn->out_sent = conn->out_size = 0;
    want(conn, conn->out_size > 0);
}

static void send_bytes(struct conn *conn, const char *data, size_t size) {
    if (joins) {
        keep(conn, data, size);
        if (conn->is_touched) return;
        if (touched_count == touched_capacity)
            touched = realloc(touched, (touched_capacity = touched_capacity * 2 + 64) * sizeof *touched);
        touched[touched_count++] = conn;
        conn->is_touched = true;
        return;
    }
    if (!conn->out_size) {
        ssize_t sent = write(conn->fd, data, size);
        if (sent == (ssize_t)size) return;
        if (sent > 0) data += sent, size -= sent;
    }
    keep(conn, data, size);
    want(conn, true);
}

static void deliver(struct conn *conn, const char *frame, size_t size) {
    if (conn->held) {
        send_bytes(conn, frame, size);
        send_bytes(conn, conn->held, conn->held_size);
        free(conn->held);
        conn->held = NULL;
        return;
    }
    if (fault && ++delivery_count % fault_every == 0) {
        if (fault == 'l') return;
        if (fault == 'd') send_bytes(conn, frame, size);
        if (fault == 'm') {
            conn->held = malloc(size);
            conn->held_size = size;
            memcpy(conn->held, frame, size);
            return;
        }
    }
    send_bytes(conn, frame, size);
}

static void publish(uint32_t number, const char *data, size_t size) {
    if (number >= channel_count) return;
    char *frame = malloc(size + 10);
    size_t head = 2;
    frame[0] = (char)0x81;
    if (size < 126) {
        frame[1] = size;
    } else if (size < 65536) {
        frame[1] = 126;
        frame[2] = size >> 8;
        frame[3] = size;
        head = 4;
    } else {
        frame[1] = 127;
        for (int i = 0; i < 8; i++) frame[2 + i] = (uint64_t)size >> (56 - 8 * i);
        head = 10;
    }
    memcpy(frame + head, data, size);
    struct channel *channel = &channels[number];
    for (uint32_t i = 0; i < channel->count; i++) deliver(channel->listeners[i], frame, head + size);
    free(frame);
}

static size_t take_publications(const char *data, size_t size) {
    size_t done = 0;
    for (;;) {
        const char *line = data + done, *line_end = memchr(line, '\n', size - done);
        if (!line_end) return done;
        size_t length = strtoul(line + 13, NULL, 10), head = line_end + 1 - line;
        if (size - done < head + length) return done;
        publish(strtoul(line + 4, NULL, 10), line_end + 1, length);
        done += head + length;
    }
}

// Clients say little: short frames, of which a ping is answered. Returns the bytes taken, or -1 at the end.
static ssize_t take_frames(struct conn *conn, const char *data, size_t size) {
    size_t done = 0;
    while (size - done >= 6) {
        const unsigned char *frame = (const unsigned char *)data + done;
        size_t length = frame[1] & 0x7f;
        if (length > 125 || !(frame[1] & 0x80)) return -1;
        if (size - done < 6 + length) break;
        if ((frame[0] & 15) == 8) return -1;
        if ((frame[0] & 15) == 9) {
            char pong[127] = {(char)0x8a, length};
            for (size_t i = 0; i < length; i++) pong[2 + i] = frame[6 + i] ^ frame[2 + i % 4];
            send_bytes(conn, pong, 2 + length);
        }
        done += 6 + length;
    }
    return done;
}

static ssize_t take_handshake(struct conn *conn, char *data, size_t size) {
    char *stop = memmem(data, size, "\r\n\r\n", 4);
    if (!stop) return size < 8192 ? 0 : -1;
    char *path_end = memmem(data, stop - data, " HTTP/1.1", 9);
    if (!path_end || path_end - data < 12 || !memmem(data, stop - data, KEY, strlen(KEY))) return -1;
    conn->channel = strtoul(path_end - 8, NULL, 10);
    if (conn->channel >= channel_count) return -1;
    struct channel *channel = &channels[conn->channel];
    if (channel->count == channel->capacity)
        channel->listeners = realloc(channel->listeners, (channel->capacity = channel->capacity * 2 + 4) * sizeof(void *));
    conn->place = channel->count;
    channel->listeners[channel->count++] = conn;
    conn->kind = SOCKET;
    send_bytes(conn, ANSWER, strlen(ANSWER));
    return stop + 4 - data;
}

static void readable(struct conn *conn) {
    size_t size = conn->in_size;
    if (size > READ_BYTES) {
        end(conn);
        return;
    }
    if (size) memcpy(buffer, conn->in, size);
    ssize_t got = read(conn->fd, buffer + size, READ_BYTES);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) end(conn);
        return;
    }
    size += got;
    if (conn->kind == NEW && buffer[0] == 'P') conn->kind = PUBLISHER;
    ssize_t done = conn->kind == PUBLISHER ? (ssize_t)take_publications(buffer, size)
                   : conn->kind == SOCKET  ? take_frames(conn, buffer, size)
                                           : take_handshake(conn, buffer, size);
    if (done < 0) {
        end(conn);
        return;
    }
    if (done < (ssize_t)size) {
        conn->in = realloc(conn->in, size - done);
        memcpy(conn->in, buffer + done, size - done);
    } else if (conn->in) {
        free(conn->in);
        conn->in = NULL;
    }
    conn->in_size = size - done;
}

int main(int count, char **arguments) {
    int port = 0;
    channel_count = 1;
    for (int i = 1; i < count; i++) {
        if (!strcmp(arguments[i], "--port") && i + 1 < count) port = atoi(arguments[++i]);
        else if (!strcmp(arguments[i], "--channels") && i + 1 < count) channel_count = atoi(arguments[++i]);
        else if (!strcmp(arguments[i], "--join")) joins = true;
        else if (!strcmp(arguments[i], "--fault") && i + 1 < count && strchr(arguments[++i], ':')) {
            fault = arguments[i][0];
            fault_every = strtoul(strchr(arguments[i], ':') + 1, NULL, 10);
        } else {
            fprintf(stderr, "usage: reference --port N [--channels N] [--join] [--fault lose:N|double:N|misorder:N]\n");
            return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    channels = calloc(channel_count, sizeof *channels);
    buffer = malloc(READ_BYTES * 2 + 1);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("reference: listening");
        return 1;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int found = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < found; i++) {
            struct conn *conn = events[i].data.ptr;
            if (conn) {
                if (events[i].events & EPOLLOUT) flush(conn);
                if (events[i].events & ~EPOLLOUT) readable(conn);
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                conn = calloc(1, sizeof *conn);
                conn->fd = fd;
                watch(conn, EPOLLIN, EPOLL_CTL_ADD);
            }
        }
        for (uint32_t i = 0; i < touched_count; i++) {
            touched[i]->is_touched = false;
            flush(touched[i]);
        }
        touched_count = 0;
    }
}
