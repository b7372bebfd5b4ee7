//! One connection, shared by concurrent calls: each has its own stream id, answers come in any order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

use super::wire::{HEADER, Response, answer_header, request};
use crate::os::lock::Lock;

/// Calls at once on one connection; more wait.
const MAX_CALLS: usize = 64;

/// Why a call got no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The connection broke before an answer came: a new one may work.
    Broken(String),
    /// Something that cannot be understood.
    Garbage(&'static str),
}

type Answer = Result<Response, CallError>;

#[derive(Default)]
struct State {
    /// Stream id of the next call. Clients use odd ones.
    next_id: u32,
    waiting: HashMap<u32, oneshot::Sender<Answer>>,
    /// Frames read so far: shows whether the server says anything at all.
    frames: u64,
    /// A call was given up while the server said nothing: later calls go elsewhere.
    stale: bool,
    broken: Option<CallError>,
}

#[derive(Default)]
struct Shared(Mutex<State>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.locked()
    }

    /// Ends the connection: everybody who waits learns why.
    fn fail(&self, why: &CallError) {
        let mut state = self.lock();
        state.broken.get_or_insert_with(|| why.clone());
        for (_, tell) in state.waiting.drain() {
            let _ = tell.send(Err(why.clone()));
        }
    }
}

/// A connection and the task that reads and writes it; ends when dropped.
pub struct Connection {
    shared: Arc<Shared>,
    frames: mpsc::Sender<Vec<u8>>,
    places: Semaphore,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes a call's place among those that wait when the caller ends, also by its deadline.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u32,
    frames: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let given_up = state.waiting.remove(&self.id).is_some();
        state.stale |= given_up && state.frames == self.frames;
    }
}

impl Connection {
    /// Takes over a connected socket. To be called inside a tokio runtime.
    pub fn new(stream: UnixStream) -> Self {
        let shared = Arc::new(Shared(Mutex::new(State { next_id: 1, ..State::default() })));
        let (frames, queue) = mpsc::channel(MAX_CALLS);
        let (reader, writer) = stream.into_split();
        let own = shared.clone();
        let task = tokio::spawn(async move {
            let why = tokio::select! {
                why = read(reader, &own) => why,
                why = write(writer, queue) => why,
            };
            own.fail(&why);
        });
        Self { shared, frames, places: Semaphore::new(MAX_CALLS), task: task.abort_handle() }
    }

    /// Whether a new call may be made on it.
    pub fn usable(&self) -> bool {
        let state = self.shared.lock();
        state.broken.is_none() && !state.stale
    }

    /// One unary call. The caller sets the deadline, `timeout` only tells it to the server.
    pub async fn call(&self, service: &str, method: &str, payload: Vec<u8>, timeout: Duration) -> Answer {
        let closed = || CallError::Broken("the connection is closed".into());
        let _place = self.places.acquire().await.map_err(|_| closed())?;
        let (tell, answer) = oneshot::channel();
        let waiting = {
            let mut state = self.shared.lock();
            if let Some(why) = &state.broken {
                return Err(why.clone());
            }
            let id = state.next_id;
            // A wrap would take two billion calls; a new connection starts over.
            state.next_id = id.checked_add(2).ok_or_else(closed)?;
            state.waiting.insert(id, tell);
            Waiting { shared: &self.shared, id, frames: state.frames }
        };
        // A task writes whole frames: a caller that gives up leaves no torn one behind.
        let frame = request(waiting.id, service, method, payload, timeout);
        self.frames.send(frame).await.map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }
}

async fn write(mut socket: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) -> CallError {
    while let Some(frame) = queue.recv().await {
        if let Err(e) = socket.write_all(&frame).await {
            return CallError::Broken(e.to_string());
        }
    }
    CallError::Broken("the connection is closed".into())
}

/// Hands out answers until the connection ends.
async fn read(mut socket: OwnedReadHalf, shared: &Shared) -> CallError {
    loop {
        match answer(&mut socket).await {
            Ok((id, response)) => {
                let mut state = shared.lock();
                state.frames += 1;
                if id % 2 == 0 || id >= state.next_id {
                    return CallError::Garbage("the answer to a call nobody made");
                }
                // Nobody waits: the call was given up.
                if let Some(tell) = state.waiting.remove(&id) {
                    let _ = tell.send(Ok(response));
                }
            }
            Err(why) => return why,
        }
    }
}

async fn answer(socket: &mut OwnedReadHalf) -> Result<(u32, Response), CallError> {
    let broken = |e: std::io::Error| CallError::Broken(e.to_string());
    let mut header = [0; HEADER];
    socket.read_exact(&mut header).await.map_err(broken)?;
    let header = answer_header(header).map_err(CallError::Garbage)?;
    // Grown as bytes come: the length is the other side's word.
    let mut body = Vec::new();
    let got = socket.take(header.length as u64).read_to_end(&mut body).await.map_err(broken)?;
    if got < header.length {
        return Err(CallError::Garbage("an answer cut short"));
    }
    let response = Response::decode(&body[..]).map_err(|_| CallError::Garbage("an answer that is not protobuf"))?;
    Ok((header.id, response))
}
