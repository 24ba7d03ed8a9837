//! Who may do what: a principal, a model, an action; denied unless a policy allows it.

mod index;

use crate::identity::{Role, SpiffeId};
use crate::resource::{AccessPolicy, Action, Model, Pattern, Subject};
use crate::snapshot::Snapshot;
use crate::units::Name;

pub use index::Policies;

/// A client of a known tenant, proved by its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal {
    pub tenant: Name,
    pub client: Name,
}

/// Why a caller is refused. Never says whether a model exists to one who may not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("the certificate does not name a client of a tenant in this trust domain")]
    NotAClient,
    #[error("the tenant is not known here")]
    UnknownTenant,
    #[error("no policy allows this client to do this with this model")]
    NotAllowed,
}

impl Denied {
    /// The stable `spillway-error` code.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotAClient => "not-a-client",
            Self::UnknownTenant => "unknown-tenant",
            Self::NotAllowed => "not-allowed",
        }
    }
}

/// Reads a verified SPIFFE id as a client of a region.
pub fn principal(snapshot: &Snapshot, region: &Name, id: &SpiffeId) -> Result<Principal, Denied> {
    let region = snapshot.regions.get(region).ok_or(Denied::NotAClient)?;
    let Role::Client { tenant, name } = &id.role else { return Err(Denied::NotAClient) };
    if id.trust_domain != region.trust_domain {
        return Err(Denied::NotAClient);
    }
    if !snapshot.tenants.contains_key(tenant) {
        return Err(Denied::UnknownTenant);
    }
    Ok(Principal { tenant: tenant.clone(), client: name.clone() })
}

/// Whether a principal may do this with this version of this model; an empty version is the default.
/// What is unknown is judged like what is known, so that only who may use a name learns whether it exists.
pub fn authorize(
    snapshot: &Snapshot,
    principal: &Principal,
    model: &str,
    version: &str,
    action: Action,
) -> Result<(), Denied> {
    let meant = snapshot.models.get(model).and_then(|model| model.version(version)).map_or(version, Name::as_str);
    let matches = |patterns: &[Pattern], name| patterns.iter().any(|pattern| pattern.matches(name));
    allowed(snapshot, principal, Some(model), action, |policy| {
        matches(&policy.models, model) && matches(&policy.versions, meant)
    })
}

/// Whether there is any model with which a principal may do this: asked before memory is spent on a
/// request that does not say its model yet.
pub fn authorize_some(snapshot: &Snapshot, principal: &Principal, action: Action) -> Result<(), Denied> {
    allowed(snapshot, principal, None, action, |_| true)
}

/// What of a policy does not fit a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    Client,
    Model,
    Version,
    Action,
}

impl Misfit {
    /// As `explain` calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Model => "model",
            Self::Version => "version",
            Self::Action => "action",
        }
    }
}

/// Every policy that names a principal's tenant, in name order, with what of it does not fit. One that fits
/// allows what [`authorize`] is asked.
pub fn considered<'a>(
    snapshot: &'a Snapshot,
    principal: &'a Principal,
    model: &'a str,
    version: &'a str,
    action: Action,
) -> impl Iterator<Item = (&'a Name, Vec<Misfit>)> {
    let meant = snapshot.models.get(model).and_then(|model| model.version(version)).map_or(version, Name::as_str);
    let matches = |patterns: &[Pattern], name| patterns.iter().any(|pattern| pattern.matches(name));
    let named = |policy: &AccessPolicy| policy.subjects.iter().any(|subject| subject.tenant == principal.tenant);
    snapshot.policies.iter().filter(move |(_, policy)| named(policy)).map(move |(name, policy)| {
        let fits = [
            (Misfit::Client, is_subject(policy, principal)),
            (Misfit::Model, matches(&policy.models, model)),
            (Misfit::Version, matches(&policy.versions, meant)),
            (Misfit::Action, policy.actions.contains(&action)),
        ];
        (name, fits.into_iter().filter(|(_, fits)| !fits).map(|(misfit, _)| misfit).collect())
    })
}

fn allowed(
    snapshot: &Snapshot,
    principal: &Principal,
    model: Option<&str>,
    action: Action,
    applies: impl Fn(&AccessPolicy) -> bool,
) -> Result<(), Denied> {
    let Some(grants) = snapshot.grants(&principal.tenant) else { return Err(Denied::NotAllowed) };
    let client = principal.client.as_str();
    let allows = grants.policies.candidates(client, model).any(|granted| {
        granted.policy.actions.contains(&action) && applies(&granted.policy) && granted.allows_client(client)
    });
    if allows { Ok(()) } else { Err(Denied::NotAllowed) }
}

fn is_subject(policy: &AccessPolicy, principal: &Principal) -> bool {
    let is =
        |subject: &Subject| subject.tenant == principal.tenant && subject.clients.matches(principal.client.as_str());
    policy.subjects.iter().any(is)
}

/// The models that a principal may see, for listings.
pub fn visible<'a>(
    snapshot: &'a Snapshot,
    principal: &'a Principal,
) -> impl Iterator<Item = (&'a Name, &'a std::sync::Arc<Model>)> {
    snapshot
        .models
        .iter()
        .filter(|(name, _)| authorize(snapshot, principal, name.as_str(), "", Action::Metadata).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource;

    const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {name: one}
spec: {subjects: [{tenant: acme, client: web-*}], models: [fraud-*, eta], actions: [infer]}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {name: two}
spec: {subjects: [{tenant: acme}, {tenant: globex}], models: ['*'], actions: [metadata]}
";

    fn snapshot() -> Snapshot {
        Snapshot::compile(1, &resource::parse(RESOURCES).unwrap()).unwrap()
    }

    fn principal_of(id: &str) -> Result<Principal, Denied> {
        principal(&snapshot(), &Name::parse("eu").unwrap(), &SpiffeId::parse(id).unwrap())
    }

    #[test]
    fn only_clients_of_known_tenants_in_the_regions_trust_domain_are_principals() {
        assert!(principal_of("spiffe://td/tenant/acme/client/web-1").is_ok());
        assert_eq!(principal_of("spiffe://other/tenant/acme/client/web-1"), Err(Denied::NotAClient));
        assert_eq!(principal_of("spiffe://td/region/eu/gateway/g"), Err(Denied::NotAClient));
        assert_eq!(principal_of("spiffe://td/tenant/initech/client/web-1"), Err(Denied::UnknownTenant));
    }

    #[test]
    fn what_no_policy_allows_is_denied() {
        let snapshot = snapshot();
        for (id, model, action, allowed) in [
            ("spiffe://td/tenant/acme/client/web-1", "fraud-eu", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/web-1", "eta", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/web-1", "eta2", Action::Infer, false),
            ("spiffe://td/tenant/acme/client/batch", "eta", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Metadata, true),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Admin, false),
        ] {
            let principal = principal_of(id).unwrap();
            let judged = authorize(&snapshot, &principal, model, "", action);
            assert_eq!(judged.is_ok(), allowed, "{id} {model} {action:?}");
            let fits = considered(&snapshot, &principal, model, "", action).any(|(_, misfits)| misfits.is_empty());
            assert_eq!(fits, allowed, "{id} {model} {action:?}");
        }
    }

    #[test]
    fn a_policy_may_be_about_some_versions() {
        let model = "
{apiVersion: spillway/v1, kind: Pool, metadata: {name: p}, spec: {region: eu, pods: [{name: a, address: '10.0.0.1:1'}]}}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: eta}
spec:
  pools: [p]
  versions: ['2', '1', 3-canary]
  backend: onnx
  deadline: 1s
  inputs: [{name: x, datatype: FP32, shape: [1]}]
  outputs: [{name: y, datatype: FP32, shape: [1]}]
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {name: three}
spec: {subjects: [{tenant: globex}], models: [eta], versions: ['2', '*-canary'], actions: [infer]}
---
";
        let resources = resource::parse(&(model.to_owned() + RESOURCES)).unwrap();
        let snapshot = Snapshot::compile(1, &resources).unwrap();
        let principal = principal_of("spiffe://td/tenant/globex/client/web-1").unwrap();
        for (version, allowed) in [("", true), ("2", true), ("3-canary", true), ("1", false), ("9", false)] {
            let judged = authorize(&snapshot, &principal, "eta", version, Action::Infer);
            assert_eq!(judged.is_ok(), allowed, "version '{version}'");
        }
    }

    #[test]
    fn what_does_not_fit_of_each_policy_is_told() {
        let snapshot = snapshot();
        let misfits = |id: &str, model| {
            let principal = principal_of(id).unwrap();
            let told = considered(&snapshot, &principal, model, "", Action::Infer);
            told.map(|(name, misfits)| (name.to_string(), misfits)).collect::<Vec<_>>()
        };
        use Misfit::{Action as Act, Client, Model};
        let (web, batch) = ("spiffe://td/tenant/acme/client/web-1", "spiffe://td/tenant/acme/client/batch");
        assert_eq!(misfits(web, "eta"), [("one".to_owned(), vec![]), ("two".to_owned(), vec![Act])]);
        assert_eq!(misfits(batch, "eta2"), [("one".to_owned(), vec![Client, Model]), ("two".to_owned(), vec![Act])]);
        let other = misfits("spiffe://td/tenant/globex/client/web-1", "eta");
        assert_eq!(other, [("two".to_owned(), vec![Act])], "policies of other tenants are not told");
    }

    #[test]
    fn a_tenants_epoch_changes_with_what_concerns_it_alone() {
        let epochs = |text: &str| {
            let snapshot = Snapshot::compile(1, &resource::parse(text).unwrap()).unwrap();
            ["acme", "globex"].map(|tenant| snapshot.grants(&Name::parse(tenant).unwrap()).unwrap().epoch)
        };
        let before = epochs(RESOURCES);
        let after = epochs(&RESOURCES.replace("client: web-*", "client: app-*"));
        assert_ne!(before[0], after[0]);
        assert_eq!(before[1], after[1]);
    }

    #[test]
    fn who_may_use_some_model_is_known_before_the_model_is() {
        let snapshot = snapshot();
        for (id, action, allowed) in [
            ("spiffe://td/tenant/acme/client/web-1", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/batch", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", Action::Metadata, true),
        ] {
            let principal = principal_of(id).unwrap();
            assert_eq!(authorize_some(&snapshot, &principal, action).is_ok(), allowed, "{id} {action:?}");
        }
    }
}
