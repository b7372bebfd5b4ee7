//! HTTP/1.1 towards an attestation service: one request, one bounded answer, one deadline.

use std::time::SystemTime;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, DATE, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::TokioExecutor;
use rustls::ClientConfig;
use tokio::time::{Instant, timeout_at};

use super::connector::Connector;
use super::transport::{Headers, is_tls};
use super::{MAX_ANSWER, shorten};
use crate::attest::VerifyError;
use crate::relay::Dialer;

/// hyper's client over marked sockets; connections are kept for the next request.
pub type HttpClient = Client<HttpsConnector<Connector>, Full<Bytes>>;

/// A client over `dialer`; `tls` is used for https addresses.
pub fn client(tls: ClientConfig, dialer: Dialer) -> HttpClient {
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(Connector(dialer));
    Client::builder(TokioExecutor::new()).pool_max_idle_per_host(4).build(connector)
}

/// A client of attestation services.
pub struct Http(HttpClient);

/// An answer, whatever its status.
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// The service's clock (RFC 9110, 6.6.1).
    pub date: Option<SystemTime>,
    /// Whether it says to be gRPC's.
    pub is_grpc: bool,
    /// Body.
    pub body: Bytes,
}

/// Why there is no answer.
pub struct HttpFailure {
    /// In the words of the verifier.
    pub error: VerifyError,
    /// Whether the port may speak something else: it was reached, and what it sent is no HTTP/1.1, or it hung up.
    pub may_be_grpc: bool,
    /// Whether it says to be gRPC's.
    pub is_grpc: bool,
}

impl From<VerifyError> for HttpFailure {
    fn from(error: VerifyError) -> Self {
        Self { error, may_be_grpc: false, is_grpc: false }
    }
}

/// The `Date` of an answer.
pub fn date(headers: &HeaderMap) -> Option<SystemTime> {
    headers.get(DATE).and_then(|v| httpdate::parse_http_date(v.to_str().ok()?).ok())
}

/// Whether an answer says to be gRPC's.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"))
}

impl Http {
    /// A client over `dialer`; `tls` is used for https addresses.
    pub fn new(tls: ClientConfig, dialer: Dialer) -> Self {
        Self(client(tls, dialer))
    }

    /// POSTs JSON.
    pub async fn post(&self, url: &str, headers: &Headers, json: String, until: Instant) -> Result<Reply, HttpFailure> {
        let mut request = Request::new(Full::from(json));
        *request.method_mut() = Method::POST;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.send(request, url, headers, until).await
    }

    /// GETs.
    pub async fn get(&self, url: &str, headers: &Headers, until: Instant) -> Result<Reply, HttpFailure> {
        self.send(Request::new(Full::default()), url, headers, until).await
    }

    async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        url: &str,
        headers: &Headers,
        until: Instant,
    ) -> Result<Reply, HttpFailure> {
        *request.uri_mut() = url.parse().map_err(|_| VerifyError::Internal)?;
        headers.add_to(request.headers_mut());
        let answered = timeout_at(until, self.0.request(request)).await.map_err(|_| VerifyError::AsTimeout)?;
        let response = answered.map_err(|e| failure(&e))?;
        let (status, date, is_grpc) = (response.status(), date(response.headers()), is_grpc(response.headers()));
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect();
        let body = timeout_at(until, body).await.map_err(|_| VerifyError::AsStalled)?.map_err(|e| {
            if e.is::<LengthLimitError>() {
                VerifyError::AsTooLarge
            } else {
                VerifyError::AsUnreachable("the answer broke off".into())
            }
        })?;
        Ok(Reply { status, date, is_grpc, body: body.to_bytes() })
    }
}

fn failure(e: &ClientError) -> HttpFailure {
    let mut text = e.to_string();
    let (mut garbage, mut tls, mut hung_up) = (false, false, false);
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        tls |= is_tls(inner);
        let http = inner.downcast_ref::<hyper::Error>();
        garbage |= http.is_some_and(hyper::Error::is_parse);
        let kind = inner.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        hung_up |= http.is_some_and(|e| e.is_incomplete_message() || e.is_closed());
        hung_up |= matches!(kind, Some(std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe));
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    let hung_up = hung_up && !e.is_connect();
    let error = match (garbage, tls) {
        (true, _) => VerifyError::AsGarbage("not HTTP".into()),
        (_, true) => VerifyError::AsTls(shorten(&text)),
        // It was there: a handler that panics ends so, and says nothing about what others are told.
        _ if hung_up => VerifyError::AsDropped(shorten(&text)),
        _ => VerifyError::AsUnreachable(shorten(&text)),
    };
    HttpFailure { error, may_be_grpc: !e.is_connect() && (garbage || hung_up), is_grpc: false }
}
