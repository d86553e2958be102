//! A gRPC service and its client, as any program would have them: tonic, without any knowledge of the mesh.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::Result;
use http::uri::PathAndQuery;
use serde_json::json;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{Grpc, NamedService, ServerStreamingService, UnaryService};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::say;

const UNARY: &str = "/e2e.Echo/Unary";
const STREAM: &str = "/e2e.Echo/Stream";

#[derive(Clone, PartialEq, prost::Message)]
struct Ask {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(uint32, tag = "2")]
    count: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(uint32, tag = "2")]
    number: u32,
    #[prost(string, tag = "3")]
    peer: String,
}

#[tokio::main]
pub(crate) async fn serve(listen: SocketAddr) -> Result<()> {
    Ok(Server::builder().serve(listen, Echo).await?)
}

#[tokio::main]
pub(crate) async fn unary(to: &str, text: String) -> Result<()> {
    let mut grpc = client(to).await?;
    let ask = Request::new(Ask { text, count: 0 });
    let codec = ProstCodec::<Ask, Answer>::default();
    let answer = grpc.unary(ask, PathAndQuery::from_static(UNARY), codec).await?.into_inner();
    say(&json!({ "text": answer.text, "peer": answer.peer }))
}

#[tokio::main]
pub(crate) async fn stream(to: &str, count: u32) -> Result<()> {
    let mut grpc = client(to).await?;
    let ask = Request::new(Ask { text: String::new(), count });
    let codec = ProstCodec::<Ask, Answer>::default();
    let answers = grpc.server_streaming(ask, PathAndQuery::from_static(STREAM), codec).await?;
    let (mut answers, mut got) = (answers.into_inner(), 0);
    while let Some(answer) = answers.next().await {
        anyhow::ensure!(answer?.number == got, "the answers are out of order");
        got += 1;
    }
    say(&json!({ "answers": got }))
}

async fn client(to: &str) -> Result<tonic::client::Grpc<Channel>> {
    let channel = Endpoint::from_shared(format!("http://{to}"))?.connect().await?;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await?;
    Ok(grpc)
}

#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "e2e.Echo";
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let codec = ProstCodec::<Answer, Ask>::default();
            Ok(match request.uri().path() {
                UNARY => Grpc::new(codec).unary(Self, request).await,
                STREAM => Grpc::new(codec).server_streaming(Self, request).await,
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

impl UnaryService<Ask> for Echo {
    type Response = Answer;
    type Future = BoxFuture<Response<Answer>, Status>;

    fn call(&mut self, request: Request<Ask>) -> Self::Future {
        let peer = peer(&request);
        let text = request.into_inner().text;
        Box::pin(async move { Ok(Response::new(Answer { text, number: 0, peer })) })
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<Answer, Status>> + Send>>;

impl ServerStreamingService<Ask> for Echo {
    type Response = Answer;
    type ResponseStream = Answers;
    type Future = BoxFuture<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Ask>) -> Self::Future {
        let peer = peer(&request);
        let count = request.into_inner().count;
        Box::pin(async move {
            let answer =
                move |number| Ok(Answer { text: "x".repeat(1000), number, peer: peer.clone() });
            Ok(Response::new(Box::pin(tokio_stream::iter((0..count).map(answer))) as Answers))
        })
    }
}

fn peer(request: &Request<Ask>) -> String {
    request.remote_addr().map_or_else(String::new, |a| a.ip().to_canonical().to_string())
}
