//! A hosted zone that takes batches as Route 53 does (API Reference, ChangeResourceRecordSets), for what moto does not
//! check: a batch is all or nothing, DELETE names a set as it is, CREATE one that is not there. moto lets a set be deleted
//! by any value that it ever had.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const NAMESPACE: &str = "https://route53.amazonaws.com/doc/2013-04-01/";

/// By name, type and identifier, each as the XML that it came in.
type Sets = BTreeMap<[String; 3], String>;

/// Ended when dropped.
pub struct Zone {
    pub endpoint: String,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    sets: Mutex<Sets>,
    /// Whom to tell that a batch has come, and what it then waits for.
    hold: Mutex<Option<(oneshot::Sender<()>, oneshot::Receiver<()>)>>,
}

/// The next batch, under way for as long as wanted.
pub struct Held {
    pub came: oneshot::Receiver<()>,
    pub let_go: oneshot::Sender<()>,
}

impl Zone {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let task = tokio::spawn({
            let state = Arc::clone(&state);
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let state = Arc::clone(&state);
                    let answer = move |request| {
                        let state = Arc::clone(&state);
                        async move { Ok::<_, Infallible>(state.answer(request).await) }
                    };
                    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
                }
            }
        });
        Self { endpoint, state, task }
    }

    /// Has the next batch wait before anything of it is looked at.
    pub fn hold(&self) -> Held {
        let ((tell, came), (let_go, wait)) = (oneshot::channel(), oneshot::channel());
        *self.state.hold.lock() = Some((tell, wait));
        Held { came, let_go }
    }

    /// Somebody else takes away what has this identifier.
    pub fn lose(&self, identifier: &str) {
        self.state.sets.lock().retain(|[.., its], _| its != identifier);
    }
}

impl Drop for Zone {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl State {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() == Method::GET {
            let sets: String = self.sets.lock().values().map(|set| element("ResourceRecordSet", set)).collect();
            let listed = element("ResourceRecordSets", &sets);
            return response(
                StatusCode::OK,
                "ListResourceRecordSetsResponse",
                &format!("{listed}<IsTruncated>false</IsTruncated><MaxItems>300</MaxItems>"),
            );
        }
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let held = self.hold.lock().take();
        if let Some((came, wait)) = held {
            came.send(()).unwrap();
            wait.await.unwrap();
        }
        let mut sets = self.sets.lock();
        match changed(&sets, std::str::from_utf8(&body).unwrap()) {
            Ok(changed) => {
                *sets = changed;
                let told = "<Id>/change/C1</Id><Status>INSYNC</Status><SubmittedAt>2026-01-01T00:00:00Z</SubmittedAt>";
                response(StatusCode::OK, "ChangeResourceRecordSetsResponse", &element("ChangeInfo", told))
            }
            Err(problem) => {
                let messages = element("Messages", &element("Message", &problem));
                response(StatusCode::BAD_REQUEST, "InvalidChangeBatch", &messages)
            }
        }
    }
}

fn changed(sets: &Sets, batch: &str) -> Result<Sets, String> {
    let mut sets = sets.clone();
    for change in batch.split("<Change>").skip(1) {
        let set = content(change, "ResourceRecordSet").unwrap();
        let key = ["Name", "Type", "SetIdentifier"].map(|tag| content(set, tag).unwrap_or_default().to_owned());
        let found = sets.get(&key).map(String::as_str);
        match (content(change, "Action").unwrap(), found) {
            ("DELETE", Some(found)) if found == set => {
                sets.remove(&key);
            }
            ("CREATE", None) | ("UPSERT", _) => {
                sets.insert(key, set.to_owned());
            }
            (action, found) => return Err(format!("{action} of {set}, where there is {found:?}")),
        }
    }
    Ok(sets)
}

/// Of the first element of this name.
fn content<'a>(xml: &'a str, tag: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{tag}>"))?;
    Some(rest.split_once(&format!("</{tag}>"))?.0)
}

fn element(tag: &str, content: &str) -> String {
    format!("<{tag}>{content}</{tag}>")
}

fn response(status: StatusCode, tag: &str, content: &str) -> Response<Full<Bytes>> {
    let xml = format!("<?xml version=\"1.0\"?><{tag} xmlns=\"{NAMESPACE}\">{content}</{tag}>");
    Response::builder().status(status).header("content-type", "text/xml").body(Full::from(xml)).unwrap()
}
