//! The control API: HTTP/1.1 on the instance's unix socket, and over TCP where configured.
//!
//! `GET /livez`, `/readyz`, `/status`, `/connections`, `/metrics`. It only reads, so whoever may
//! open the socket may ask; every request is bounded in size, time and number.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::dataplane::DataPlane;
use super::status::{ConfinementView, State, StatusReport, unix_seconds};
use crate::os::lock::Lock;

/// Requests answered at once; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 32;
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;
/// A client that has not sent its head by then is cut off.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
/// A connection's whole life.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(15);
/// Content type of OpenMetrics 1.0 text.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why the control API could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket could not be used.
    #[error("control socket: {0}")]
    Socket(#[from] io::Error),
}

impl ControlError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        "control-socket-failed"
    }
}

/// What the life cycle tells the control API, beside the data plane's own state.
pub struct ControlState {
    plane: Mutex<Option<Arc<DataPlane>>>,
    instance: String,
    config_path: String,
    life: Mutex<Life>,
}

struct Life {
    state: State,
    problems: Vec<String>,
    last_reload_error: Option<String>,
    worker_problem: Option<String>,
    api_problem: Option<String>,
    confinement: ConfinementView,
}

impl ControlState {
    /// In state `starting`, without a data plane yet.
    pub fn new(instance: &str, config_path: &str) -> Arc<Self> {
        Arc::new(Self {
            plane: Mutex::new(None),
            instance: instance.to_owned(),
            config_path: config_path.to_owned(),
            life: Mutex::new(Life {
                state: State::Starting,
                problems: Vec::new(),
                last_reload_error: None,
                worker_problem: None,
                api_problem: None,
                confinement: ConfinementView::default(),
            }),
        })
    }

    /// The data plane runs.
    pub fn set_plane(&self, plane: Arc<DataPlane>) {
        *self.plane.locked() = Some(plane);
    }

    /// What confines the process.
    pub fn set_confinement(&self, confinement: ConfinementView) {
        self.life.locked().confinement = confinement;
    }

    /// The life cycle moved on.
    pub fn set_state(&self, state: State) {
        self.life.locked().state = state;
    }

    /// What is wrong, in words; shown while it is not empty, and `ready` then reads `degraded`.
    pub fn set_problems(&self, problems: Vec<String>) {
        self.life.locked().problems = problems;
    }

    /// The worker that does not answer the heartbeat, in words.
    pub fn set_worker_problem(&self, problem: Option<String>) {
        self.life.locked().worker_problem = problem;
    }

    /// What [`ControlState::set_worker_problem`] said last.
    pub fn worker_problem(&self) -> Option<String> {
        self.life.locked().worker_problem.clone()
    }

    /// Where this API is not served although the configuration asks for it, in words. Nothing but a restart mends it.
    pub fn set_api_problem(&self, problem: Option<String>) {
        self.life.locked().api_problem = problem;
    }

    /// How the last reload failed, or `None` when it did not.
    pub fn set_reload_error(&self, error: Option<String>) {
        self.life.locked().last_reload_error = error;
    }

    fn plane(&self) -> Option<Arc<DataPlane>> {
        self.plane.locked().clone()
    }

    /// The state as operators see it.
    pub fn state(&self) -> State {
        let problems = self.problems();
        match self.life.locked().state {
            State::Ready if !problems.is_empty() => State::Degraded,
            state => state,
        }
    }

    /// What the life cycle and the data plane find wrong.
    fn problems(&self) -> Vec<String> {
        let mut all = {
            let life = self.life.locked();
            life.problems.iter().chain(&life.worker_problem).chain(&life.api_problem).cloned().collect::<Vec<_>>()
        };
        all.extend(self.plane().map(|p| p.problems()).unwrap_or_default());
        all
    }

    /// Whether new connections are served.
    fn is_ready(&self) -> bool {
        matches!(self.state(), State::Ready | State::Reloading | State::Degraded)
            // Without endpoints (a configuration with errors) every connection is refused.
            && self.plane().is_some_and(|p| !p.is_draining() && !p.config().0.endpoints.is_empty())
    }

    /// The whole status.
    pub fn report(&self) -> StatusReport {
        let state = self.state();
        let plane = self.plane();
        let problems = self.problems();
        let life = self.life.locked();
        StatusReport {
            instance: self.instance.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            netns: crate::instance::paths::netns_inode("self").unwrap_or(0),
            state,
            problems,
            config_path: self.config_path.clone(),
            config_loaded_at: plane.as_ref().map(|p| unix_seconds(p.config().1)).unwrap_or(0),
            last_reload_error: life.last_reload_error.clone(),
            listeners: plane.as_ref().map(|p| p.listener_views()).unwrap_or_default(),
            endpoints: plane.as_ref().map(|p| p.endpoint_views()).unwrap_or_default(),
            confinement: life.confinement.clone(),
            kernel: None,
            log_records_lost: super::log_records_lost().get(),
        }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET {
            return json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({ "error": "only GET is served" }));
        }
        let plane = self.plane();
        match path {
            "/livez" => json(StatusCode::OK, &serde_json::json!({ "live": true })),
            "/readyz" => {
                let ready = self.is_ready();
                let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                json(status, &serde_json::json!({ "ready": ready, "state": self.state() }))
            }
            "/status" => json(StatusCode::OK, &self.report()),
            "/connections" => match plane {
                Some(plane) => json(StatusCode::OK, &plane.connections()),
                None => unavailable(),
            },
            "/metrics" => match plane.map(|p| p.metrics_text()) {
                Some(Ok(text)) => respond(StatusCode::OK, OPENMETRICS, text.into()),
                Some(Err(_)) | None => unavailable(),
            },
            _ => json(StatusCode::NOT_FOUND, &serde_json::json!({ "error": "no such resource" })),
        }
    }
}

fn unavailable() -> Response<Full<Bytes>> {
    json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({ "error": "the data plane does not run" }))
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    respond(status, "application/json", serde_json::to_vec(value).unwrap_or_default().into())
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Serves the API on `unix`, and on `tcp` if given, until `stop`. Call it within the runtime.
///
/// # Errors
/// When a socket cannot be used.
pub async fn serve(
    state: Arc<ControlState>,
    unix: std::os::unix::net::UnixListener,
    tcp: Option<std::net::TcpListener>,
    stop: CancellationToken,
) -> Result<(), ControlError> {
    unix.set_nonblocking(true)?;
    let unix = UnixListener::from_std(unix)?;
    let tcp = match tcp {
        Some(tcp) => {
            tcp.set_nonblocking(true)?;
            Some(TcpListener::from_std(tcp)?)
        }
        None => None,
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = tokio::select! {
            _ = stop.cancelled() => return Ok(()),
            place = places.clone().acquire_owned() => match place {
                Ok(place) => place,
                Err(_) => return Ok(()),
            },
        };
        let over_tcp = async {
            match &tcp {
                Some(tcp) => tcp.accept().await,
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            _ = stop.cancelled() => return Ok(()),
            accepted = unix.accept() => accepted.map(|(stream, _)| spawn(stream, state.clone(), place)),
            accepted = over_tcp => accepted.map(|(stream, _)| spawn(stream, state.clone(), place)),
        };
        if let Err(error) = accepted {
            // Descriptors may be exhausted; the socket stays, so asking again later is enough.
            tracing::warn!(%error, "control API cannot accept");
            sleep(Duration::from_millis(200)).await;
        }
    }
}

fn spawn<S>(stream: S, state: Arc<ControlState>, place: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            let response = state.answer(request.method(), request.uri().path());
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service);
        // A client that breaks off is not worth a word.
        let _ = timeout(CONNECTION_DEADLINE, connection).await;
        drop(place);
    });
}
