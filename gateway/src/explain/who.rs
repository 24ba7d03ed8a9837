//! Who asks, and for what, as the URL of an explanation says it.

use std::net::IpAddr;

use spillway_core::identity::{Role, SpiffeId, TrustDomain};
use spillway_core::units::Name;

use crate::infer::clipped;
use crate::request::query::decoded;

/// Who asks, and for what.
#[derive(Debug, PartialEq, Eq)]
pub struct Who {
    pub id: SpiffeId,
    pub model: String,
    /// Empty: the model's default.
    pub version: String,
    /// The client's.
    pub address: Option<IpAddr>,
}

impl Who {
    /// Reads a URL's query, strictly.
    pub fn read(query: &str, trust_domain: &TrustDomain) -> Result<Self, String> {
        const KNOWN: [&str; 6] = ["as", "tenant", "client", "model", "version", "address"];
        let mut values = [const { None::<String> }; KNOWN.len()];
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let place = KNOWN.iter().position(|known| *known == name);
            let place = place.and_then(|index| values.get_mut(index)).ok_or_else(|| {
                format!(
                    "'{}' is not known; expected {}",
                    clipped(name),
                    KNOWN.map(|known| format!("{known}=")).join(" ")
                )
            })?;
            let value = decoded(value).and_then(|value| String::from_utf8(value).ok());
            let value = value.ok_or_else(|| format!("'{name}' is not well encoded"))?;
            if place.replace(value).is_some() {
                return Err(format!("'{name}' is given twice"));
            }
        }
        let [id, tenant, client, model, version, address] = values;
        let name = |what, text: String| Name::parse(&text).map_err(|_| format!("'{}' is no {what}", clipped(&text)));
        let id = match (id, tenant, client) {
            (Some(id), None, None) => SpiffeId::parse(&id).map_err(|problem| format!("as: {problem}"))?,
            (None, Some(tenant), Some(client)) => {
                let role =
                    Role::Client { tenant: name("tenant's name", tenant)?, name: name("client's name", client)? };
                SpiffeId { trust_domain: trust_domain.clone(), role }
            }
            _ => return Err("who asks? expected as=SPIFFE_ID, or tenant=NAME and client=NAME".into()),
        };
        let model = model.filter(|model| !model.is_empty()).ok_or("for which model? expected model=NAME")?;
        let address = address.map(|text| text.parse().map_err(|_| format!("'{}' is no IP address", clipped(&text))));
        Ok(Self { id, model, version: version.unwrap_or_default(), address: address.transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &str) -> Result<Who, String> {
        Who::read(query, &TrustDomain::parse("td").unwrap())
    }

    #[test]
    fn a_caller_is_named_by_its_id_or_by_tenant_and_client() {
        let whole = read("as=spiffe%3a%2f%2ftd%2ftenant%2facme%2fclient%2fweb&model=eta").unwrap();
        assert_eq!(read("tenant=acme&client=web&model=eta"), Ok(whole));
        let who = read("tenant=acme&client=web&model=eta&version=2&address=192.0.2.7").unwrap();
        assert_eq!((who.version.as_str(), who.address), ("2", Some([192, 0, 2, 7].into())));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (query, problem) in [
            ("model=eta", "who asks?"),
            ("tenant=acme&model=eta", "who asks?"),
            ("as=spiffe%3a%2f%2ftd%2fx&model=eta", "as: the path is"),
            ("as=x&tenant=acme&client=web&model=eta", "who asks?"),
            ("tenant=a b&client=web&model=eta", "is no tenant's name"),
            ("tenant=acme&client=web", "for which model?"),
            ("tenant=acme&client=web&model=eta&model=eta", "'model' is given twice"),
            ("tenant=acme&client=web&model=%zz", "'model' is not well encoded"),
            ("tenant=acme&client=web&model=eta&address=here", "'here' is no IP address"),
            ("tenant=acme&client=web&model=eta&entity=x", "'entity' is not known; expected as= tenant="),
        ] {
            let told = read(query).unwrap_err();
            assert!(told.contains(problem), "{query}: {told}");
        }
    }
}
