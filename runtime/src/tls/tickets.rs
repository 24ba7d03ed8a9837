//! Session tickets (RFC 8446, sections 2.2 and 4.6.1): a client that was here comes back without signatures of either side.
//!
//! The rule: a ticket never says more than the handshake that it comes from. It lives [`LIFE`] from when the client proved its
//! key, however often it is used and renewed in between, and never longer than our own certificate; who holds it is judged by the
//! chain in it as in a full handshake ([`super::accept()`]). Keys are exchanged anew each time (psk_dhe_ke, the only mode that
//! rustls has), so that what is said later stays secret when a ticket's key is lost, and there is no early data.
//!
//! A ticket is the session itself, sealed, and not a name for one that is kept here: with the client's chain that is 1 to 2 KB,
//! and how many there are would be for clients to say. The key belongs to one identity of one process. A new certificate of ours,
//! another trust bundle and each revocation therefore end all tickets, and no other port, trust domain or process takes
//! one: it answers with a full handshake. Gateways share no key although several go by one name: whoever has it can write a
//! ticket in any client's name, so that one stolen key would be every client's at every gateway.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustls::TicketRotator;
use rustls::crypto::GetRandomFailed;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::ProducesTickets;

/// From a client's signature to the last connection without another one.
const LIFE: Duration = Duration::from_secs(3_600);
/// Given in each handshake. One is enough: who uses it gets the next.
pub(super) const TICKETS: usize = 1;

/// The tickets of one identity. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Tickets {
    keys: Arc<TicketRotator>,
    /// The end of our certificate.
    not_after: SystemTime,
}

/// The tickets that one handshake takes and gives.
#[derive(Debug)]
struct Handshake {
    tickets: Tickets,
    /// When the client proved its key, Unix time in seconds. [`THIS_HANDSHAKE`] until a ticket says otherwise.
    proved_at: AtomicU64,
}

const THIS_HANDSHAKE: u64 = u64::MAX;

impl Tickets {
    /// With a key that nobody else has.
    ///
    /// # Panics
    /// If the system has no randomness, without which there is no TLS.
    pub fn new(not_after: SystemTime) -> Self {
        // A key seals for one life and opens for another.
        let period = u32::try_from(LIFE.as_secs()).expect("an hour has few seconds");
        let keys = TicketRotator::new(period, Key::create).expect("the system has randomness");
        Self { keys: Arc::new(keys), not_after }
    }

    pub fn for_handshake(&self) -> Arc<dyn ProducesTickets> {
        Arc::new(Handshake { tickets: self.clone(), proved_at: AtomicU64::new(THIS_HANDSHAKE) })
    }

    /// How long a client that proved its key then may come back without doing so again.
    fn left(&self, proved_at: u64, now: SystemTime) -> Option<Duration> {
        // A proof in the future says that the clock was set back: how old it is cannot be known.
        let age = unix(now).checked_sub(proved_at)?;
        let left = LIFE.checked_sub(Duration::from_secs(age))?;
        let left = left.min(self.not_after.duration_since(now).ok()?);
        (!left.is_zero()).then_some(left)
    }
}

impl Handshake {
    fn proved_at(&self, now: SystemTime) -> u64 {
        self.proved_at.load(Ordering::Relaxed).min(unix(now))
    }

    fn seal(&self, session: &[u8], now: SystemTime) -> Option<Vec<u8>> {
        let proved_at = self.proved_at(now);
        self.tickets.left(proved_at, now)?;
        self.tickets.keys.encrypt(&[&proved_at.to_be_bytes(), session].concat())
    }

    fn open(&self, ticket: &[u8], now: SystemTime) -> Option<Vec<u8>> {
        let opened = self.tickets.keys.decrypt(ticket)?;
        let (proved_at, session) = opened.split_first_chunk()?;
        let proved_at = u64::from_be_bytes(*proved_at);
        self.tickets.left(proved_at, now)?;
        // Of several tickets the oldest counts, whichever is taken.
        self.proved_at.fetch_min(proved_at, Ordering::Relaxed);
        Some(session.to_vec())
    }
}

impl ProducesTickets for Handshake {
    fn enabled(&self) -> bool {
        true
    }

    /// In seconds.
    fn lifetime(&self) -> u32 {
        let now = SystemTime::now();
        let left = self.tickets.left(self.proved_at(now), now).unwrap_or_default();
        u32::try_from(left.as_secs()).unwrap_or(0)
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.seal(session, SystemTime::now())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket, SystemTime::now())
    }
}

/// rustls's own sealing, AES-256-CBC with HMAC-SHA-256 (RFC 5077, section 4), under one key: it would change keys by itself
/// after six hours, which none of ours is in use for.
#[derive(Debug)]
struct Key(Arc<dyn ProducesTickets>);

impl Key {
    fn create() -> Result<Box<dyn ProducesTickets>, GetRandomFailed> {
        Ok(Box::new(Self(Ticketer::new().map_err(|_| GetRandomFailed)?)))
    }
}

impl ProducesTickets for Key {
    fn enabled(&self) -> bool {
        self.0.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.0.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.0.encrypt(plain)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.0.decrypt(ticket)
    }
}

fn unix(now: SystemTime) -> u64 {
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(86_400);

    fn handshake(tickets: &Tickets) -> Handshake {
        Handshake { tickets: tickets.clone(), proved_at: AtomicU64::new(THIS_HANDSHAKE) }
    }

    /// Now, in whole seconds as tickets count.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(unix(SystemTime::now()))
    }

    #[test]
    fn a_ticket_opens_for_an_hour_from_the_proof_however_often_it_is_renewed() {
        let now = now();
        let tickets = Tickets::new(now + DAY);
        let mut ticket = handshake(&tickets).seal(b"session", now).unwrap();
        for minutes in [10, 30, 59] {
            let later = now + minutes * 60 * SECOND;
            let returning = handshake(&tickets);
            assert_eq!(returning.open(&ticket, later).unwrap(), b"session", "{minutes}");
            ticket = returning.seal(b"session", later).unwrap();
        }
        assert!(handshake(&tickets).open(&ticket, now + LIFE - SECOND).is_some());
        assert!(handshake(&tickets).open(&ticket, now + LIFE).is_none());
        // Who is refused proves its key anew, and gets a whole hour.
        let proved = handshake(&tickets);
        assert!(proved.open(&ticket, now + LIFE).is_none());
        let next = proved.seal(b"session", now + LIFE).unwrap();
        assert!(handshake(&tickets).open(&next, now + 2 * LIFE - SECOND).is_some());
    }

    #[test]
    fn a_ticket_ends_with_our_certificate() {
        let now = now();
        let tickets = Tickets::new(now + 60 * SECOND);
        let given = handshake(&tickets);
        let ticket = given.seal(b"session", now).unwrap();
        assert!(given.lifetime() <= 60);
        assert!(handshake(&tickets).open(&ticket, now + 59 * SECOND).is_some());
        assert!(handshake(&tickets).open(&ticket, now + 60 * SECOND).is_none());
        assert!(handshake(&tickets).seal(b"session", now + 60 * SECOND).is_none());
        assert_eq!(handshake(&Tickets::new(now - SECOND)).lifetime(), 0);
    }

    #[test]
    fn a_ticket_from_the_future_is_none() {
        let now = now();
        let tickets = Tickets::new(now + DAY);
        let ticket = handshake(&tickets).seal(b"session", now).unwrap();
        assert!(handshake(&tickets).open(&ticket, now - SECOND).is_none());
    }

    #[test]
    fn of_several_tickets_the_oldest_proof_counts() {
        let now = now();
        let tickets = Tickets::new(now + DAY);
        let old = handshake(&tickets).seal(b"old", now - 30 * 60 * SECOND).unwrap();
        let new = handshake(&tickets).seal(b"new", now).unwrap();
        for both in [[&old, &new], [&new, &old]] {
            let returning = handshake(&tickets);
            assert!(both.iter().all(|ticket| returning.open(ticket, now).is_some()));
            assert_eq!(returning.proved_at(now), unix(now - 30 * 60 * SECOND));
        }
    }

    #[test]
    fn tickets_of_another_identity_and_changed_ones_do_not_open() {
        let now = now();
        let (ours, theirs) = (Tickets::new(now + DAY), Tickets::new(now + DAY));
        let ticket = handshake(&ours).seal(b"session", now).unwrap();
        assert!(handshake(&theirs).open(&ticket, now).is_none());
        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert!(handshake(&ours).open(&changed, now).is_none(), "byte {at}");
        }
        for length in [0, 7, 15, 16, 32, 64, ticket.len() - 1] {
            assert!(handshake(&ours).open(&ticket[..length], now).is_none(), "{length} bytes");
        }
    }

    #[test]
    fn what_a_client_is_told_is_what_is_left() {
        let tickets = Tickets::new(SystemTime::now() + DAY);
        let first = handshake(&tickets);
        assert!((3_599..=3_600).contains(&first.lifetime()));
        let old = handshake(&tickets).seal(b"session", SystemTime::now() - 3_000 * SECOND).unwrap();
        first.decrypt(&old).unwrap();
        assert!((599..=601).contains(&first.lifetime()), "{}", first.lifetime());
    }
}
