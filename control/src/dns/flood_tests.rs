//! A flood of queries from forged senders, and a client who asks meanwhile.
//!
//! Senders are forged as the loopback allows: sockets at many addresses of 127.0.0.0/8, each /24 a network of its own.
//! What the client's slowest times are depends on who else is on the machine, and is told rather than asserted; that
//! it is answered, and how little the flood gets, is asserted.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::rr::RecordType;
use spillway_core::units::Rate;
use spillway_figures::{Goal, record};

use super::fixture::{Ask, Running, view, zone};
use super::settings::{RateLimitSettings, TcpSettings};

const RATE: u64 = 20_000;
const TIME: Duration = Duration::from_secs(3);
/// Sockets send this many in a row before the clock is looked at.
const BURST: u64 = 40;

/// Of the client's queries. On a quiet machine all are answered; a reader that is kept from its core for longer than the
/// kernel's buffer lasts (50 ms) loses some.
const LEAST_SHARE: f64 = 0.9;

/// What a flood got.
#[derive(Debug, Default)]
struct Got {
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    answers: AtomicU64,
    answer_bytes: AtomicU64,
    longest: AtomicU64,
}

impl Got {
    /// What has come for a socket.
    fn read(&self, socket: &UdpSocket, answer: &mut [u8]) {
        while let Ok(length) = socket.recv(answer) {
            self.answers.fetch_add(1, Ordering::Relaxed);
            self.answer_bytes.fetch_add(length as u64, Ordering::Relaxed);
            self.longest.fetch_max(length as u64, Ordering::Relaxed);
        }
    }
}

/// Sends at the rate from as many networks, and reads what comes back, until told to end.
fn flood(to: SocketAddr, networks: u32, message: &[u8], got: &Got, ends: &AtomicBool) {
    let sockets: Vec<UdpSocket> = (0..networks)
        .map(|network| {
            let socket = UdpSocket::bind((Ipv4Addr::from_bits(0x7f40_0001 + (network << 8)), 0)).unwrap();
            socket.connect(to).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect();
    let (began, mut sent, mut answer) = (Instant::now(), 0, [0; 4_096]);
    while !ends.load(Ordering::Relaxed) {
        let due = (began.elapsed().as_secs_f64() * RATE as f64) as u64;
        if sent >= due {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        for _ in 0..BURST.min(due - sent) {
            let socket = &sockets[(sent % u64::from(networks)) as usize];
            if socket.send(message).is_ok() {
                got.sent.fetch_add(1, Ordering::Relaxed);
                got.sent_bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
            }
            sent += 1;
            got.read(socket, &mut answer);
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    sockets.iter().for_each(|socket| got.read(socket, &mut answer));
}

/// Asks every two milliseconds from networks of its own in turn, and gives how long each answer took; none: it did not
/// come.
fn client(to: SocketAddr) -> Vec<Option<Duration>> {
    let sockets = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map(|network| {
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 200, network, 1), 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    });
    let message = Ask::of("infer.example.com.", RecordType::A).edns(1_232).bytes();
    let (until, mut times, mut answer) = (Instant::now() + TIME, Vec::new(), [0; 2_048]);
    for socket in sockets.iter().cycle().take_while(|_| Instant::now() < until) {
        let began = Instant::now();
        socket.send(&message).unwrap();
        times.push(socket.recv(&mut answer).ok().map(|_| began.elapsed()));
        std::thread::sleep(Duration::from_millis(2));
    }
    times
}

/// A flood from so many networks beside one client.
async fn under_flood(networks: u32, limit: RateLimitSettings) -> (Arc<Got>, Vec<Option<Duration>>) {
    let running = Running::start(zone(), &limit, TcpSettings::default());
    running.server.take(view());
    let (to, got, ends) = (running.address, Arc::new(Got::default()), Arc::new(AtomicBool::new(false)));
    // The longest answer to a short question.
    let message = Ask::of("infer.example.com.", RecordType::HTTPS).edns(65_535).bytes();
    let flooding = std::thread::spawn({
        let (got, ends) = (Arc::clone(&got), Arc::clone(&ends));
        move || flood(to, networks, &message, &got, &ends)
    });
    let times = tokio::task::spawn_blocking(move || client(to)).await.unwrap();
    ends.store(true, Ordering::Relaxed);
    flooding.join().unwrap();
    (got, times)
}

fn report(what: &str, got: &Got, times: &[Option<Duration>]) -> (f64, Duration, Duration) {
    let mut answered: Vec<Duration> = times.iter().flatten().copied().collect();
    answered.sort();
    let quantile = |part: f64| answered[((answered.len() - 1) as f64 * part) as usize];
    let share = answered.len() as f64 / times.len() as f64;
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "{what}: {:.0} queries/s, {:.1} % answered, bytes out {:.2} of bytes in, longest {} B; client: {} queries, \
         {:.1} % answered, p50 {:?}, p99 {:?}, p99.9 {:?}",
        of(&got.sent) as f64 / TIME.as_secs_f64(),
        of(&got.answers) as f64 * 100.0 / of(&got.sent) as f64,
        of(&got.answer_bytes) as f64 / of(&got.sent_bytes) as f64,
        of(&got.longest),
        times.len(),
        share * 100.0,
        quantile(0.5),
        quantile(0.99),
        quantile(0.999),
    );
    (share, quantile(0.5), quantile(0.99))
}

fn figures(which: &str, got: &Got, answered: f64, p99: Duration) {
    let name = |what: &str| format!("control.dns.flood.{which}.{what}");
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64;
    record(&name("rate"), of(&got.sent) / TIME.as_secs_f64(), "queries/s", Goal::AtLeast(RATE as f64 * 0.9));
    record(&name("others_answered"), answered * 100.0, "%", Goal::AtLeast(LEAST_SHARE * 100.0));
    record(&name("others_p99"), p99.as_secs_f64() * 1e3, "ms", Goal::AtMost(5.0));
    record(&name("longest_answer"), of(&got.longest), "B", Goal::AtMost(1_232.0));
    record(&name("bytes_out_of_in"), of(&got.answer_bytes) / of(&got.sent_bytes), "ratio", Goal::None);
}

fn limit(rate: u64, burst: u32) -> RateLimitSettings {
    let rate = Rate { count: rate, per: Duration::from_secs(1) };
    RateLimitSettings { rate, burst, ..RateLimitSettings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t68_show_6_a_flood_from_a_few_networks_gets_less_than_it_sends_and_harms_nobody() {
    let (got, times) = under_flood(20, limit(100, 100)).await;
    let (share, p50, p99) = report("20 networks", &got, &times);
    figures("few_networks", &got, share, p99);
    assert!(share >= LEAST_SHARE, "{share}");
    assert!(p50 < Duration::from_millis(5), "{p50:?}");
    assert!(got.answer_bytes.load(Ordering::Relaxed) < got.sent_bytes.load(Ordering::Relaxed), "it amplifies nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t68_show_6_a_flood_from_thousands_of_networks_leaves_others_their_answers() {
    let (got, times) = under_flood(4_000, RateLimitSettings::default()).await;
    let (share, p50, p99) = report("4,000 networks", &got, &times);
    figures("many_networks", &got, share, p99);
    assert!(share >= LEAST_SHARE, "{share}");
    assert!(p50 < Duration::from_millis(5), "{p50:?}");
    assert!(got.longest.load(Ordering::Relaxed) <= 1_232);
}
