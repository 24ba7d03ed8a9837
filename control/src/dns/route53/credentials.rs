//! Who may write the records.
//!
//! The rule: what AWS's own tools would take, and nothing more: no metadata service, no sign-on. A file is read anew
//! for each correction, so that whoever renews keys needs no restart. Keys are in no message.

use std::io;
use std::path::{Path, PathBuf};

use aws_sdk_route53::config::Credentials;

use super::settings::CredentialsSettings;

/// A larger file is none.
const MOST_BYTES: u64 = 1 << 20;

/// The operator's fault.
#[derive(Debug, thiserror::Error)]
pub enum NoCredentials {
    #[error("{0} is set, and {1} is not")]
    Half(&'static str, &'static str),
    #[error("{}: cannot be read", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{}: has no profile '{profile}' with a key and its secret", path.display())]
    Absent { path: PathBuf, profile: String },
    #[error("neither the environment nor the settings name any")]
    Nowhere,
}

/// Finds them. `environment` gives a variable; blocks on the file.
pub fn find(
    settings: &CredentialsSettings,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Credentials, NoCredentials> {
    const KEY: &str = "AWS_ACCESS_KEY_ID";
    const SECRET: &str = "AWS_SECRET_ACCESS_KEY";
    let variable = |name| environment(name).filter(|value| !value.is_empty());
    if settings.file.is_none() && settings.profile.is_none() {
        match (variable(KEY), variable(SECRET)) {
            (Some(key), Some(secret)) => {
                return Ok(Credentials::new(key, secret, variable("AWS_SESSION_TOKEN"), None, "environment"));
            }
            (Some(_), None) => return Err(NoCredentials::Half(KEY, SECRET)),
            (None, Some(_)) => return Err(NoCredentials::Half(SECRET, KEY)),
            (None, None) => {}
        }
    }
    let of_home = || Some(Path::new(&variable("HOME")?).join(".aws/credentials"));
    let path = settings.file.clone().or_else(|| variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from));
    let path = path.or_else(of_home).ok_or(NoCredentials::Nowhere)?;
    let profile = settings.profile.clone().or_else(|| variable("AWS_PROFILE")).unwrap_or_else(|| "default".into());
    let text = read(&path).map_err(|source| NoCredentials::Unreadable { path: path.clone(), source })?;
    of_profile(&text, &profile).ok_or(NoCredentials::Absent { path, profile })
}

fn read(path: &Path) -> io::Result<String> {
    if std::fs::metadata(path)?.len() > MOST_BYTES {
        return Err(io::Error::other("it is too large"));
    }
    std::fs::read_to_string(path)
}

/// The shared file's format: sections in brackets, `key = value`, lines of comment.
fn of_profile(text: &str, profile: &str) -> Option<Credentials> {
    let (mut is_ours, mut key, mut secret, mut token) = (false, None, None, None);
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.split_once(']')) {
            is_ours = section.0.trim() == profile;
        } else if is_ours && let Some((name, value)) = line.split_once('=') {
            let slot = match name.trim().to_ascii_lowercase().as_str() {
                "aws_access_key_id" => &mut key,
                "aws_secret_access_key" => &mut secret,
                "aws_session_token" => &mut token,
                _ => continue,
            };
            *slot = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        }
    }
    Some(Credentials::new(key?, secret?, token, None, "file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(found: &Credentials) -> (&str, &str, Option<&str>) {
        (found.access_key_id(), found.secret_access_key(), found.session_token())
    }

    #[test]
    fn the_environment_comes_first_unless_a_file_or_a_profile_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        let text = "# ours\n[default]\naws_access_key_id = A\naws_secret_access_key=s=1\nregion = x\n\n\
                    [ other ]\nAWS_ACCESS_KEY_ID = B\naws_secret_access_key = t\naws_session_token = u\n\
                    [half]\naws_access_key_id = C\naws_secret_access_key =\n";
        std::fs::write(&path, text).unwrap();
        let shared = path.display().to_string();
        let environment = |keys: bool| {
            let shared = shared.clone();
            move |name: &str| match name {
                "AWS_ACCESS_KEY_ID" if keys => Some("E".to_owned()),
                "AWS_SECRET_ACCESS_KEY" if keys => Some("f".to_owned()),
                "AWS_SESSION_TOKEN" => Some(String::new()),
                "AWS_SHARED_CREDENTIALS_FILE" => Some(shared.clone()),
                _ => None,
            }
        };
        let of = |file: Option<PathBuf>, profile: Option<&str>| CredentialsSettings {
            file,
            profile: profile.map(str::to_owned),
        };
        assert_eq!(told(&find(&of(None, None), environment(true)).unwrap()), ("E", "f", None));
        assert_eq!(told(&find(&of(None, None), environment(false)).unwrap()), ("A", "s=1", None));
        assert_eq!(told(&find(&of(None, Some("other")), environment(true)).unwrap()), ("B", "t", Some("u")));
        assert_eq!(told(&find(&of(Some(path.clone()), None), |_| None).unwrap()), ("A", "s=1", None));
        for (settings, fault) in [
            (of(None, Some("half")), "has no profile 'half' with"),
            (of(None, Some("none")), "has no profile 'none' with"),
            (of(Some(folder.path().join("away")), None), "away: cannot be read"),
        ] {
            let error = find(&settings, environment(true)).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
        let half = |name: &str| (name == "AWS_ACCESS_KEY_ID").then(|| "E".to_owned());
        let error = find(&of(None, None), half).unwrap_err().to_string();
        assert_eq!(error, "AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not");
        assert!(matches!(find(&of(None, None), |_| None), Err(NoCredentials::Nowhere)));
    }
}
