//! A control node of which a test decides every byte: gRPC by hand, over real TLS.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use spillway_proto::control;
use spillway_proto::control::from_node::Message as FromNode;
use spillway_proto::control::to_node::Message as ToNode;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::fixture::Domain;
use crate::tls::{Offer, Workload, accept};

pub const CONTROL: &str = "spiffe://spillway.test/region/eu/control/one";
const WITHIN: Duration = Duration::from_secs(10);

pub struct FakeControl {
    pub address: SocketAddr,
    streams: mpsc::UnboundedReceiver<FakeStream>,
    /// Its connections. Dropped, they are gone.
    _tasks: JoinSet<()>,
}

/// A node's stream, as the server sees it.
pub struct FakeStream {
    to_node: mpsc::UnboundedSender<Bytes>,
    from_node: mpsc::UnboundedReceiver<control::FromNode>,
}

impl FakeControl {
    pub async fn start(domain: &Domain) -> Self {
        Self::start_as(domain.workload(CONTROL)).await
    }

    pub async fn start_as(workload: Arc<Workload>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (began, streams) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (workload, began) = (workload.clone(), began.clone());
                connections.spawn(async move {
                    let Ok(accepted) = accept(&workload, stream, Offer::H2, WITHIN).await else { return };
                    let service = service_fn(move |request| {
                        let answer = follow(request, &began);
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    let connection = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(accepted.stream), service);
                    let _ = connection.await;
                });
            }
        });
        Self { address, streams, _tasks: tasks }
    }

    /// The next stream that a node begins, and its Hello.
    pub async fn stream(&mut self) -> (FakeStream, control::Hello) {
        let mut stream = timeout(2 * WITHIN, self.streams.recv()).await.expect("a stream begins").unwrap();
        match stream.next().await {
            Some(FromNode::Hello(hello)) => (stream, hello),
            other => panic!("expected a Hello, found {other:?}"),
        }
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

fn follow(request: Request<Incoming>, began: &mpsc::UnboundedSender<FakeStream>) -> Response<Body> {
    assert_eq!(request.uri().path(), "/spillway.control.v1.Distribution/Follow");
    let (to_node, mut frames) = mpsc::unbounded_channel::<Bytes>();
    let (said, from_node) = mpsc::unbounded_channel();
    tokio::spawn(read(request.into_body(), said));
    let _ = began.send(FakeStream { to_node, from_node });
    let frames = stream::poll_fn(move |context| {
        frames.poll_recv(context).map(|frame| frame.map(|frame| Ok::<_, Infallible>(Frame::data(frame))))
    });
    let body = StreamBody::new(frames).boxed_unsync();
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

async fn read(mut body: Incoming, said: mpsc::UnboundedSender<control::FromNode>) {
    let mut buffer = BytesMut::new();
    while let Some(Ok(frame)) = body.frame().await {
        let Ok(data) = frame.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while buffer.len() >= 5 {
            let length = u32::from_be_bytes(buffer[1..5].try_into().unwrap()) as usize;
            if buffer.len() < 5 + length {
                break;
            }
            let message = buffer.split_to(5 + length).split_off(5);
            let _ = said.send(control::FromNode::decode(message).unwrap());
        }
    }
}

impl FakeStream {
    /// Sends these bytes as one message.
    pub fn send_raw(&self, message: &[u8]) {
        let mut frame = BytesMut::with_capacity(5 + message.len());
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len()).unwrap());
        frame.extend_from_slice(message);
        let _ = self.to_node.send(frame.freeze());
    }

    pub fn send(&self, message: ToNode) {
        self.send_raw(&control::ToNode { message: Some(message) }.encode_to_vec());
    }

    /// What the node says next; none at the end of its stream.
    pub async fn next(&mut self) -> Option<FromNode> {
        let message = timeout(2 * WITHIN, self.from_node.recv()).await.expect("the node says something")?;
        Some(message.message.unwrap())
    }

    /// What comes of what was sent last: the last step, or the refusal. Heartbeats in between do not count.
    pub async fn outcome(&mut self) -> Result<control::Ack, control::Nack> {
        loop {
            match self.next().await.expect("the stream goes on") {
                FromNode::Ack(ack) if ack.step() == control::ack::Step::Applied => return Ok(ack),
                FromNode::Nack(nack) => return Err(nack),
                _ => {}
            }
        }
    }
}
