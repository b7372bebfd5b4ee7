//! A ttrpc client over a unix socket that outlives its server.

mod connection;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use self::connection::{CallError, Connection};
use super::AttestError;

/// gRPC code of a call that took longer than the deadline it came with.
pub const DEADLINE_EXCEEDED: i32 = 4;
/// gRPC code of a method the server does not have.
pub const UNIMPLEMENTED: i32 = 12;
/// gRPC code some servers answer instead (declared, not implemented).
pub const NOT_FOUND: i32 = 5;

/// Pauses before each attempt at a call whose connection breaks under it: a server that restarts is back within
/// them. All calls made here may be repeated.
const PAUSES: [Duration; 5] =
    [Duration::ZERO, Duration::ZERO, Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(300)];

/// A client that connects when it is called and again after any failure. All calls share one connection.
pub struct Client {
    socket: PathBuf,
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Client {
    /// A client of the server at `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), connection: Mutex::new(None) }
    }

    fn unreachable(&self, e: impl std::fmt::Display) -> AttestError {
        AttestError::AaUnreachable(format!("{}: {e}", self.socket.display()))
    }

    async fn connection(&self) -> std::io::Result<Arc<Connection>> {
        let mut kept = self.connection.lock().await;
        if let Some(connection) = kept.as_ref().filter(|c| c.usable()) {
            return Ok(connection.clone());
        }
        // Calls under way on the old one go on; it ends with the last of them.
        *kept = None;
        let connection = Arc::new(Connection::new(UnixStream::connect(&self.socket).await?));
        *kept = Some(connection.clone());
        Ok(connection)
    }

    /// One unary call. The caller sets the deadline; `timeout` tells it to the server.
    ///
    /// # Errors
    /// The server cannot be reached, sends what cannot be understood, or answers with an error.
    pub async fn call(
        &self,
        service: &str,
        method: &str,
        payload: &impl Message,
        timeout: Duration,
    ) -> Result<Vec<u8>, AttestError> {
        let payload = payload.encode_to_vec();
        let mut broken = None;
        for pause in PAUSES {
            tokio::time::sleep(pause).await;
            let connection = match (self.connection().await, &broken) {
                (Ok(connection), _) => connection,
                // Nobody was there from the beginning: not a restart.
                (Err(e), None) => return Err(self.unreachable(e)),
                (Err(e), Some(_)) => {
                    broken = Some(e.to_string());
                    continue;
                }
            };
            match connection.call(service, method, payload.clone(), timeout).await {
                Ok(response) => return wire::outcome(response),
                Err(CallError::Garbage(what)) => return Err(AttestError::AaGarbage(what)),
                Err(CallError::Broken(why)) => broken = Some(why),
            }
        }
        Err(self.unreachable(broken.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests;
