//! Unary gRPC over HTTP/2: one method call, one message each way, one deadline.
//!
//! The `h2` and `prost` that carry tunnels and the agent's protocol are enough for three methods of one service;
//! a gRPC library would bring some fifty crates more. Format: "gRPC over HTTP/2" of the gRPC project.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::{Buf, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::connector::target;
use super::greeting::Greeting;
use super::http::{date, is_grpc};
use super::request::Refusal;
use super::transport::{Headers, is_tls};
use super::{MAX_ANSWER, shorten};
use crate::attest::{AsStatus, VerifyError};
use crate::relay::{Dialer, Source, Target};

/// An idle connection older than this is not used again: a middlebox may have forgotten it, and the call would stall.
const MAX_IDLE: Duration = Duration::from_secs(60);
/// Flag and length before each message.
const PREFIX: usize = 5;
/// Headers and trailers of an answer, bytes: the text of an error holds a stack trace, each line break as three bytes.
const MAX_HEADERS: u32 = 256 << 10;

/// Codes of the gRPC project that are used here.
pub mod code {
    /// The server's own deadline.
    pub const DEADLINE_EXCEEDED: u16 = 4;
    /// A proxy asks for other credentials.
    pub const PERMISSION_DENIED: u16 = 7;
    /// No such method.
    pub const UNIMPLEMENTED: u16 = 12;
    /// The service is not there for now.
    pub const UNAVAILABLE: u16 = 14;
    /// A proxy asks for credentials.
    pub const UNAUTHENTICATED: u16 = 16;
}

/// A client of one address; its connection is kept.
pub struct Grpc {
    target: Target,
    /// Scheme and authority, and the path before the service's name.
    base: Uri,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    dialer: Dialer,
    kept: Mutex<Option<Kept>>,
    /// Whether the newest connection was greeted as HTTP/2 greets.
    greeted: Arc<AtomicBool>,
}

struct Kept {
    sender: SendRequest<Bytes>,
    used: Instant,
}

/// What a call gave.
pub struct Answer {
    /// The message.
    pub message: Bytes,
    /// The service's clock, if it told.
    pub date: Option<SystemTime>,
}

/// Why a call gave no message.
#[derive(Debug)]
pub enum CallError {
    /// A gRPC status other than OK, with its text.
    Status(u16, String),
    /// No status was heard.
    Failed(VerifyError),
}

impl From<VerifyError> for CallError {
    fn from(error: VerifyError) -> Self {
        Self::Failed(error)
    }
}

enum Broken {
    /// The connection had ended before the call reached anybody: a new one may work.
    Stale(VerifyError),
    Final(CallError),
}

impl Broken {
    /// Of what became of a call. Whatever ended the connection, asking again does no harm while nobody has answered; a
    /// service that dropped this very call would do so again.
    fn of(e: &h2::Error) -> Self {
        match failure(e) {
            dropped @ VerifyError::AsDropped(_) => Self::Final(dropped.into()),
            other => Self::Stale(other),
        }
    }
}

impl Grpc {
    /// A client of the service at `base`, whose scheme says whether `tls` is used.
    pub fn new(base: &url::Url, mut tls: ClientConfig, dialer: Dialer) -> Result<Self, String> {
        let base: Uri = base.as_str().parse().map_err(|e| format!("{base}: {e}"))?;
        let target = target(&base);
        let tls = if base.scheme_str() == Some("https") {
            tls.alpn_protocols = vec![b"h2".to_vec()];
            let host = base.host().unwrap_or_default().trim_matches(['[', ']']);
            let name = ServerName::try_from(host.to_owned()).map_err(|e| format!("{base}: {e}"))?;
            Some((TlsConnector::from(Arc::new(tls)), name))
        } else {
            None
        };
        Ok(Self { target, base, tls, dialer, kept: Mutex::new(None), greeted: Arc::default() })
    }

    /// Calls `attestation.AttestationService/METHOD`.
    pub async fn call(
        &self,
        method: &str,
        message: &[u8],
        headers: &Headers,
        until: Instant,
    ) -> Result<Answer, CallError> {
        for reuse in [true, false] {
            let connected = timeout_at(until, self.connection(reuse)).await.map_err(|_| VerifyError::AsTimeout)?;
            let (sender, reused) = connected?;
            match self.once(sender, method, message, headers, until).await {
                Ok(answer) => return Ok(answer),
                Err(Broken::Stale(_)) if reused => {}
                Err(Broken::Stale(error)) => {
                    self.forget().await;
                    return Err(error.into());
                }
                Err(Broken::Final(error)) => {
                    if matches!(&error, CallError::Failed(e) if !matches!(e, VerifyError::AsDropped(_))) {
                        // Whatever was wrong with it, the next call begins anew. A dropped call says nothing of the
                        // connection, which others use.
                        self.forget().await;
                    }
                    return Err(error);
                }
            }
        }
        Err(VerifyError::Internal.into())
    }

    /// Whether somebody who speaks HTTP/2 is there: he says so at once (RFC 9113, section 3.4), however long a call takes.
    pub fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::Relaxed)
    }

    async fn forget(&self) {
        *self.kept.lock().await = None;
    }

    /// A connection, and whether it was there before.
    async fn connection(&self, reuse: bool) -> Result<(SendRequest<Bytes>, bool), VerifyError> {
        let mut kept = self.kept.lock().await;
        let now = Instant::now();
        if let Some(known) = kept.as_mut().filter(|k| reuse && now.duration_since(k.used) < MAX_IDLE) {
            known.used = now;
            return Ok((known.sender.clone(), true));
        }
        *kept = None;
        let sender = self.connect().await?;
        *kept = Some(Kept { sender: sender.clone(), used: now });
        Ok((sender, false))
    }

    async fn connect(&self) -> Result<SendRequest<Bytes>, VerifyError> {
        let tcp = self.dialer.connect(&self.target, Source::Own).await;
        let tcp = tcp.map_err(|e| VerifyError::AsUnreachable(shorten(&e.to_string())))?;
        let _ = tcp.set_nodelay(true);
        self.greeted.store(false, Ordering::Relaxed);
        let greeted = self.greeted.clone();
        let Some((connector, name)) = &self.tls else { return handshake(Greeting::new(tcp, greeted)).await };
        let tls = connector.connect(name.clone(), tcp).await.map_err(|e| {
            let text = shorten(&e.to_string());
            if is_tls(&e) { VerifyError::AsTls(text) } else { VerifyError::AsUnreachable(text) }
        })?;
        handshake(Greeting::new(tls, greeted)).await
    }

    fn request(&self, method: &str, headers: &Headers, until: Instant) -> Result<Request<()>, VerifyError> {
        let path = format!("{}attestation.AttestationService/{method}", self.base.path());
        let mut uri = self.base.clone().into_parts();
        uri.path_and_query = Some(path.parse().map_err(|_| VerifyError::Internal)?);
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_parts(uri).map_err(|_| VerifyError::Internal)?;
        let fields = request.headers_mut();
        fields.insert("te", HeaderValue::from_static("trailers"));
        fields.insert("content-type", HeaderValue::from_static("application/grpc"));
        let left = until.saturating_duration_since(Instant::now()).as_millis().clamp(1, 99_999_999);
        let left = HeaderValue::from_str(&format!("{left}m")).map_err(|_| VerifyError::Internal)?;
        fields.insert("grpc-timeout", left);
        headers.add_to(fields);
        Ok(request)
    }

    async fn once(
        &self,
        sender: SendRequest<Bytes>,
        method: &str,
        message: &[u8],
        headers: &Headers,
        until: Instant,
    ) -> Result<Answer, Broken> {
        let fail = |e: VerifyError| Broken::Final(e.into());
        let request = self.request(method, headers, until).map_err(fail)?;
        let head = async {
            let mut sender = sender.ready().await.map_err(|e| Broken::of(&e))?;
            let (response, mut body) = sender.send_request(request, false).map_err(|e| Broken::of(&e))?;
            let mut framed = BytesMut::with_capacity(PREFIX + message.len());
            framed.extend_from_slice(&[0]);
            framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
            framed.extend_from_slice(message);
            // h2 keeps what the peer's window does not take yet; a message is at most as long as a certificate.
            body.send_data(framed.freeze(), true).map_err(|e| Broken::of(&e))?;
            response.await.map_err(|e| Broken::of(&e))
        };
        let head = timeout_at(until, head).await.map_err(|_| fail(VerifyError::AsTimeout))??;
        let rest = timeout_at(until, read(head)).await.map_err(|_| fail(VerifyError::AsStalled))?;
        rest.map_err(Broken::Final)
    }
}

async fn handshake<T>(io: T) -> Result<SendRequest<Bytes>, VerifyError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = h2::client::Builder::new()
        .enable_push(false)
        .max_header_list_size(MAX_HEADERS)
        .initial_window_size((MAX_ANSWER + PREFIX) as u32)
        .initial_connection_window_size((4 * MAX_ANSWER) as u32)
        .handshake(io)
        .await
        .map_err(|e| failure(&e))?;
    // Ends with the last sender, or when the service hangs up.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

async fn read(head: http::Response<h2::RecvStream>) -> Result<Answer, CallError> {
    let (head, mut body) = head.into_parts();
    if !head.status.is_success() {
        let status = AsStatus::Http(head.status.as_u16());
        return Err(Refusal::of_text("not an answer of gRPC".into()).error(status).into());
    }
    if !is_grpc(&head.headers) {
        return Err(VerifyError::AsGarbage("the answer is not one of gRPC".into()).into());
    }
    // An answer without a message has its status in the head.
    if let Some(status) = status(&head.headers)? {
        return Err(status);
    }
    let mut data = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|e| failure(&e))?;
        if data.len() + chunk.len() > MAX_ANSWER + PREFIX {
            return Err(VerifyError::AsTooLarge.into());
        }
        data.extend_from_slice(&chunk);
        body.flow_control().release_capacity(chunk.len()).map_err(|e| failure(&e))?;
    }
    let trailers = body.trailers().await.map_err(|e| failure(&e))?.unwrap_or_default();
    match status(&trailers)? {
        None if trailers.contains_key("grpc-status") => {}
        None => return Err(VerifyError::AsGarbage("the answer ends without grpc-status".into()).into()),
        Some(status) => return Err(status),
    }
    Ok(Answer { message: message(data.freeze())?, date: date(&head.headers) })
}

/// The error that a status stands for; `None`: no status, or OK.
fn status(headers: &HeaderMap) -> Result<Option<CallError>, VerifyError> {
    let Some(value) = headers.get("grpc-status") else { return Ok(None) };
    let garbage = || VerifyError::AsGarbage("grpc-status is no number".into());
    let code: u16 = value.to_str().ok().and_then(|v| v.parse().ok()).ok_or_else(garbage)?;
    let text = headers.get("grpc-message").map(|v| percent_decode(v.as_bytes())).unwrap_or_default();
    Ok((code != 0).then_some(CallError::Status(code, text)))
}

/// Text of `grpc-message`. What is no escape stands for itself.
fn percent_decode(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let digit = |at: usize| tail.get(at).and_then(|b| (*b as char).to_digit(16));
        let (byte, after) = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, &tail[2..]),
            _ => (first, tail),
        };
        out.push(byte);
        rest = after;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The one message of an answer's body.
fn message(mut data: Bytes) -> Result<Bytes, VerifyError> {
    let garbage = |what: &str| VerifyError::AsGarbage(what.into());
    if data.len() < PREFIX {
        return Err(garbage("the answer holds no message"));
    }
    let compressed = data.get_u8();
    let length = data.get_u32() as usize;
    match (compressed, length == data.len()) {
        (0, true) => Ok(data),
        (0, false) => Err(garbage("the answer holds not one message")),
        _ => Err(garbage("the answer is compressed, which nobody asked for")),
    }
}

/// What an HTTP/2 failure means. A peer that speaks something else violates the protocol. A stream that it resets was
/// read by it, unless it says REFUSED_STREAM (RFC 9113, section 8.7): a handler that panics ends so.
fn failure(e: &h2::Error) -> VerifyError {
    let tls = e.get_io().is_some_and(|io| is_tls(io));
    let text = shorten(&e.to_string());
    if tls {
        VerifyError::AsTls(text)
    } else if e.is_reset() && e.is_remote() && e.reason() != Some(h2::Reason::REFUSED_STREAM) {
        VerifyError::AsDropped(text)
    } else if e.is_library() {
        VerifyError::AsGarbage(format!("not HTTP/2: {text}"))
    } else {
        VerifyError::AsUnreachable(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_one_whole_uncompressed_frame() {
        let of = |bytes: &[u8]| message(Bytes::copy_from_slice(bytes)).map(|b| b.to_vec());
        assert_eq!(of(&[0, 0, 0, 0, 2, 7, 8]), Ok(vec![7, 8]));
        assert_eq!(of(&[0, 0, 0, 0, 0]), Ok(vec![]));
        for bad in [&[][..], &[0, 0, 0, 0], &[0, 0, 0, 0, 2, 7], &[0, 0, 0, 0, 1, 7, 8], &[1, 0, 0, 0, 1, 7]] {
            assert_eq!(of(bad).unwrap_err().reason(), "as-garbage", "{bad:?}");
        }
    }

    #[test]
    fn a_status_is_read_with_its_text() {
        let with = |code: &'static str, text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", HeaderValue::from_static(code));
            headers.insert("grpc-message", HeaderValue::from_static(text));
            status(&headers)
        };
        assert!(matches!(with("0", ""), Ok(None)));
        assert!(status(&HeaderMap::new()).unwrap().is_none());
        let Ok(Some(CallError::Status(code, text))) = with("10", "Policy `x`%0Anot found %zz %") else { panic!() };
        assert_eq!((code, text.as_str()), (10, "Policy `x`\nnot found %zz %"));
        assert!(with("ten", "").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(crate::attest::changes::CASES))]

        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = message(Bytes::copy_from_slice(&bytes));
            let _ = percent_decode(&bytes);
            let mut headers = HeaderMap::new();
            for name in ["grpc-status", "grpc-message"] {
                if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                    headers.insert(name, value);
                }
            }
            let _ = status(&headers);
        }
    }
}
