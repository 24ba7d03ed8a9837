//! Certificates of `spillway dev`: the authority's folder, the first leaf of each process, and all leaves of who runs no
//! process: clients, the operator, loaders of features.
//!
//! ```text
//! pki/{root,intermediate}.*   the authority, which the control node signs with; pki/NAME/: the next one
//! pki/trust-bundle.pem        what clients trust: kept as the control node says
//! pki/NAME.{pem,key}          a leaf; of a process also pki/NAME.trust.pem, which it keeps itself
//! ```
//!
//! The rule: processes renew at the control node, like everywhere. Here a leaf is made only for who cannot ask: at the
//! start, when another root signs, and when too little is left of one, since a machine that slept wakes with leaves that
//! have ended.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use spillway_core::identity::{ExpectedPeer, SpiffeId, TrustDomain};
use spillway_core::units::parse_duration;
use spillway_proto::control::BundleRequest;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::dial::dial;
use spillway_runtime::file::write_atomic;
use spillway_runtime::tls::{IdentitySettings, Workload, examine};

use super::fleet::{OPERATOR, SERVICE, TRUST_DOMAIN};

/// Clients are people at a keyboard: theirs live a day.
const CLIENT_LIFE: Duration = Duration::from_secs(86_400);
/// Processes have renewed theirs when half is left; of whom a quarter is left cannot.
const LEFT: u32 = 4;
/// A leaf and its key are two files: what does not fit for a moment may be under way.
const SECOND_LOOK: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(3);
const SHORTEST_LIFE: Duration = Duration::from_secs(20);
const LONGEST_LIFE: Duration = Duration::from_secs(86_400);
/// A root is announced for this part of a leaf's life before it signs, but for at least [`SHORTEST_NOTICE`].
const NOTICE_PART: u32 = 20;
const SHORTEST_NOTICE: Duration = Duration::from_secs(4);
/// How often the trust bundle is asked for within a notice.
const ASKS: u32 = 4;

pub struct Certificates {
    dir: PathBuf,
    pace: Pace,
    holders: Vec<Holder>,
}

/// Who has a certificate.
struct Holder {
    id: SpiffeId,
    files: IdentitySettings,
    /// Has a process that keeps leaf and trust bundle fresh.
    renews: bool,
    life: Duration,
    /// Where clients dial it.
    dialled: Option<IpAddr>,
}

/// How long leaves of processes live, and what follows from that.
#[derive(Clone, Copy)]
pub struct Pace {
    pub life: Duration,
}

impl Pace {
    /// As `--life` says it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let life = parse_duration(text).map_err(|error| error.to_string())?;
        let fits = (SHORTEST_LIFE..=LONGEST_LIFE).contains(&life);
        if fits { Ok(Self { life }) } else { Err("expected 20s to 24h".into()) }
    }

    pub fn notice(self) -> Duration {
        (self.life / NOTICE_PART).max(SHORTEST_NOTICE)
    }

    pub fn every(self) -> Duration {
        self.notice() / ASKS
    }
}

impl Certificates {
    /// The authority of the folder, or a new one.
    pub fn open(dir: &Path, store: &Path, pace: Pace) -> Result<Self> {
        let pki = dir.join("pki");
        if !pki.join("root.pem").exists() {
            ensure!(
                !store.exists(),
                "{} knows an authority that {} does not hold any more: remove it, too, or the whole of {}",
                store.display(),
                pki.display(),
                dir.display()
            );
            Authority::create(TrustDomain::parse(TRUST_DOMAIN)?)?.save(&pki)?;
        }
        Ok(Self { dir: dir.to_owned(), pace, holders: Vec::new() })
    }

    /// A process, which renews its leaf.
    pub fn process(&mut self, name: &str, id: &str, dialled: Option<IpAddr>) -> Result<()> {
        let files = of_process(&self.dir, name);
        self.holders.push(Holder { id: SpiffeId::parse(id)?, files, renews: true, life: self.pace.life, dialled });
        Ok(())
    }

    /// Somebody who runs no process.
    pub fn caller(&mut self, name: &str, id: &str) -> Result<()> {
        let files = of_caller(&self.dir, name);
        self.holders.push(Holder { id: SpiffeId::parse(id)?, files, renews: false, life: CLIENT_LIFE, dialled: None });
        Ok(())
    }

    /// First leaves for all, under the root that signed when the folder was last in use.
    pub fn issue_all(&self) -> Result<()> {
        let authority = self.signer()?;
        self.holders.iter().try_for_each(|holder| self.issue(&authority, holder))
    }

    /// Until stopped: what cannot keep itself is kept fresh, by what the control node says of the roots.
    pub async fn keep(&self, control: SocketAddr) {
        let mut told = String::new();
        loop {
            let problem = match self.look(control).await {
                Ok(()) => String::new(),
                Err(error) => format!("{error:#}"),
            };
            // While the control node is away, at the first look alone.
            if problem != told && !problem.is_empty() {
                eprintln!("certificates stay as they are: {problem}");
            }
            told = problem;
            tokio::time::sleep(self.pace.every()).await;
        }
    }

    async fn look(&self, control: SocketAddr) -> Result<()> {
        let mut late: Vec<&Holder> = self.holders.iter().filter(|holder| holder.is_late()).collect();
        if !late.is_empty() {
            tokio::time::sleep(SECOND_LOOK).await;
            late.retain(|holder| holder.is_late());
        }
        if !late.is_empty() {
            let authority = self.signer()?;
            for holder in late {
                self.issue(&authority, holder)?;
                eprintln!("{} has a new certificate: it did not renew its own", holder.id);
            }
        }
        let bundle = self.ask(control).await.context("the trust bundle")?;
        if bundle != self.bundle()? {
            self.take(&bundle)?;
        }
        Ok(())
    }

    /// The roots that the control node says are trusted, the one that signs first.
    async fn ask(&self, control: SocketAddr) -> Result<String> {
        let workload = Workload::load(&of_caller(&self.dir, OPERATOR))?;
        let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        let mut client = AuthorityClient::new(dial(&workload, expected, &control.to_string(), PATIENCE).await?);
        let answer = tokio::time::timeout(PATIENCE, client.bundle(BundleRequest {})).await??;
        Ok(answer.into_inner().roots)
    }

    /// Trusts other roots from now on. Who has no process gets a leaf of the root that signs now.
    fn take(&self, bundle: &str) -> Result<()> {
        let next = self.signer_of(bundle).context("the root that signs now is not in the folder pki")?;
        let signed = self.signer()?.root_id();
        write_atomic(&self.shared_bundle(), bundle.as_bytes(), 0o644)?;
        eprintln!("{} has changed: {} roots", self.shared_bundle().display(), bundle.matches("BEGIN").count());
        if next.root_id() != signed {
            self.holders.iter().filter(|holder| !holder.renews).try_for_each(|holder| self.issue(&next, holder))?;
            eprintln!("clients have certificates of the root {}", next.root_id());
        }
        Ok(())
    }

    fn issue(&self, authority: &Authority, holder: &Holder) -> Result<()> {
        let mut request = LeafRequest::new(holder.id.clone(), holder.life);
        if let Some(address) = holder.dialled {
            request = request.dialled_locally();
            request.dns_names.push(SERVICE.into());
            request.addresses.push(address);
        }
        // Its key stays, so that curl never reads a certificate that is not for the key.
        let key = std::fs::read_to_string(&holder.files.key).ok();
        let again = key.and_then(|key| authority.issue_again(&request, &key).ok());
        let leaf = again.map_or_else(|| authority.issue(&request), Ok)?;
        if holder.renews {
            write_atomic(&holder.files.trust_bundle, self.bundle()?.as_bytes(), 0o644)?;
        }
        Ok(leaf.save(&holder.files.certificate, &holder.files.key)?)
    }

    /// The authority under whose root leaves were signed last. A bundle that none of ours leads is not believed.
    fn signer(&self) -> Result<Authority> {
        let bundle = self.bundle().unwrap_or_default();
        if let Some(signer) = self.signer_of(&bundle) {
            return Ok(signer);
        }
        let pki = self.dir.join("pki");
        let authority = Authority::load(&pki)
            .with_context(|| format!("{} holds a broken authority; remove {}", pki.display(), self.dir.display()))?;
        write_atomic(&self.shared_bundle(), authority.trust_bundle().as_bytes(), 0o644)?;
        Ok(authority)
    }

    /// The authority of ours whose root is the first of the bundle.
    fn signer_of(&self, bundle: &str) -> Option<Authority> {
        let pki = self.dir.join("pki");
        let within = std::fs::read_dir(&pki).into_iter().flatten().flatten().map(|entry| entry.path());
        let folders = std::iter::once(pki.clone()).chain(within.filter(|path| path.join("root.pem").is_file()));
        folders
            .filter_map(|folder| Authority::load(folder).ok())
            .find(|authority| bundle.starts_with(authority.trust_bundle()))
    }

    fn bundle(&self) -> Result<String> {
        let file = self.shared_bundle();
        std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }

    fn shared_bundle(&self) -> PathBuf {
        shared_bundle(&self.dir)
    }
}

impl Holder {
    /// Whether its leaf ends soon, or is none.
    fn is_late(&self) -> bool {
        let IdentitySettings { certificate, key, trust_bundle } = &self.files;
        let (Ok(certificate), Ok(key), Ok(bundle)) =
            (std::fs::read(certificate), std::fs::read(key), std::fs::read(trust_bundle))
        else {
            return true;
        };
        let now = SystemTime::now();
        examine(&[certificate, key, bundle], now + self.life / LEFT).is_err()
    }
}

/// What those trust who run no process.
pub fn shared_bundle(dir: &Path) -> PathBuf {
    dir.join("pki/trust-bundle.pem")
}

/// The files of who runs no process.
pub fn of_caller(dir: &Path, name: &str) -> IdentitySettings {
    IdentitySettings {
        certificate: file(dir, name, "pem"),
        key: file(dir, name, "key"),
        trust_bundle: shared_bundle(dir),
    }
}

/// The files of a process. Its trust bundle is its own: roots go only when its own leaf leads to another.
pub fn of_process(dir: &Path, name: &str) -> IdentitySettings {
    IdentitySettings { trust_bundle: file(dir, name, "trust.pem"), ..of_caller(dir, name) }
}

fn file(dir: &Path, name: &str, extension: &str) -> PathBuf {
    dir.join("pki").join(format!("{}.{extension}", name.replace('/', ".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Pace = Pace { life: Duration::from_secs(3_600) };
    const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gateway-0";

    fn certificates(dir: &Path) -> Certificates {
        let mut certificates = Certificates::open(dir, &dir.join("control.sqlite"), HOUR).unwrap();
        certificates.process("eu/gateway-0", GATEWAY, Some([127, 0, 0, 2].into())).unwrap();
        certificates.caller("acme", "spiffe://spillway.test/tenant/acme/client/dev").unwrap();
        certificates.issue_all().unwrap();
        certificates
    }

    fn next(dir: &Path) -> Authority {
        let next = Authority::create(TrustDomain::parse(TRUST_DOMAIN).unwrap()).unwrap();
        next.save(dir.join("pki/next")).unwrap();
        next
    }

    fn certificate(holder: &Holder) -> String {
        std::fs::read_to_string(&holder.files.certificate).unwrap()
    }

    #[test]
    fn callers_follow_the_root_that_signs_and_processes_are_left_to_themselves() {
        spillway_runtime::tls::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let certificates = certificates(folder.path());
        let [process, caller] = &certificates.holders[..] else { panic!("two") };
        let old = certificates.bundle().unwrap();
        let next = next(folder.path());
        let first = [certificate(process), certificate(caller)];
        let key = std::fs::read(&caller.files.key).unwrap();

        certificates.take(&format!("{old}{}", next.trust_bundle())).unwrap();
        assert_eq!([certificate(process), certificate(caller)], first, "it is announced, and does not sign");
        certificates.take(&format!("{}{old}", next.trust_bundle())).unwrap();
        certificates.take(next.trust_bundle()).unwrap();
        assert_eq!(certificate(process), first[0]);
        assert_eq!(std::fs::read_to_string(&process.files.trust_bundle).unwrap(), old);
        assert_eq!(Workload::load(&caller.files).unwrap().id(), caller.id);
        assert!(!caller.is_late(), "its leaf leads to the new root");
        assert_eq!(std::fs::read(&caller.files.key).unwrap(), key, "at no moment another key lay beside its leaf");

        // The next start.
        let again = self::certificates(folder.path());
        assert_eq!(again.bundle().unwrap(), next.trust_bundle());
        assert!(!again.holders[0].is_late());
    }

    #[test]
    fn roots_that_nobody_here_can_sign_under_are_not_taken() {
        spillway_runtime::tls::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let certificates = certificates(folder.path());
        let (old, next) = (certificates.bundle().unwrap(), next(folder.path()));
        std::fs::remove_dir_all(folder.path().join("pki/next")).unwrap();
        assert!(certificates.take(&format!("{}{old}", next.trust_bundle())).is_err());
        assert_eq!(certificates.bundle().unwrap(), old);
        std::fs::write(certificates.shared_bundle(), next.trust_bundle()).unwrap();
        certificates.issue_all().unwrap();
        assert_eq!(certificates.bundle().unwrap(), old, "a stranger's bundle is replaced");
    }

    #[tokio::test]
    async fn who_has_too_little_left_gets_a_leaf_also_while_the_control_node_is_away() {
        spillway_runtime::tls::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let certificates = certificates(folder.path());
        let holder = &certificates.holders[0];
        assert!(!holder.is_late());
        let leaf = |left| {
            let request = LeafRequest::new(holder.id.clone(), left);
            certificates.signer().unwrap().issue(&request).unwrap().save(&holder.files.certificate, &holder.files.key)
        };
        leaf(HOUR.life * 3 / 10).unwrap();
        assert!(!holder.is_late(), "it may be renewed still");
        leaf(HOUR.life / 5).unwrap();
        assert!(holder.is_late());
        let away = certificates.look(([127, 0, 0, 1], 1).into()).await.unwrap_err();
        assert!(format!("{away:#}").starts_with("the trust bundle"), "{away:#}");
        assert!(!holder.is_late());
        std::fs::remove_file(&holder.files.key).unwrap();
        assert!(holder.is_late());
    }

    #[test]
    fn a_store_without_its_authority_is_not_started() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("control.sqlite");
        std::fs::write(&store, "").unwrap();
        let problem = Certificates::open(folder.path(), &store, HOUR).err().unwrap().to_string();
        assert!(problem.contains("remove it"), "{problem}");
    }

    #[test]
    fn roots_are_announced_for_a_twentieth_of_a_life() {
        let pace = |text| Pace::parse(text).map(|pace| (pace.notice().as_secs(), pace.every().as_secs()));
        assert_eq!(pace("1h"), Ok((180, 45)));
        assert_eq!(pace("20s"), Ok((4, 1)));
        assert!(Pace::parse("10s").is_err() && Pace::parse("2d").is_err() && Pace::parse("1").is_err());
    }
}
