//! The seam between an endpoint and its attested channel: tests put plain TLS here.

use tokio::net::TcpStream;

use crate::tls::{Channel, ChannelError, Door, Ending, EndpointTls, Standings};

/// One endpoint's end of the tunnel.
#[async_trait::async_trait]
pub trait TunnelSide: Send + Sync + 'static {
    /// Makes `tcp` a channel as its client; the peer was appraised when it returns.
    async fn connect(&self, tcp: TcpStream, server_name: Option<&str>) -> Result<Channel, ChannelError>;
    /// The same as its server.
    async fn accept(&self, tcp: TcpStream) -> Result<Channel, ChannelError>;
    /// [`TunnelSide::connect`] until `ending` says why it ends.
    async fn connect_until(
        &self,
        tcp: TcpStream,
        server_name: Option<&str>,
        ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        tokio::select! {
            biased;
            made = self.connect(tcp, server_name) => made,
            error = ending => Err(error),
        }
    }
    /// [`TunnelSide::accept`] until `ending` says why it ends. `door` may be opened or not: the caller asks it.
    async fn accept_until(
        &self,
        tcp: TcpStream,
        _door: &dyn Door,
        ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        tokio::select! {
            biased;
            made = self.accept(tcp) => made,
            error = ending => Err(error),
        }
    }
    /// What `status` shows of it.
    fn status(&self) -> serde_json::Value;
    /// A configuration was taken over that leaves this side as it is.
    fn reloaded(&self) {}
    /// Whether the same configuration would make another side now: a file that it names holds something else.
    fn is_stale(&self) -> bool {
        false
    }
    /// Its peers with open connections.
    fn peers(&self) -> Option<Standings> {
        None
    }
    /// It takes the place of a side with these peers, and judges them from now on.
    fn take_over(&self, _peers: &Standings) {}
}

#[async_trait::async_trait]
impl TunnelSide for EndpointTls {
    async fn connect(&self, tcp: TcpStream, server_name: Option<&str>) -> Result<Channel, ChannelError> {
        EndpointTls::connect(self, tcp, server_name).await
    }

    async fn accept(&self, tcp: TcpStream) -> Result<Channel, ChannelError> {
        EndpointTls::accept(self, tcp).await
    }

    async fn connect_until(
        &self,
        tcp: TcpStream,
        server_name: Option<&str>,
        ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        EndpointTls::connect_until(self, tcp, server_name, ending).await
    }

    async fn accept_until(&self, tcp: TcpStream, door: &dyn Door, ending: Ending<'_>) -> Result<Channel, ChannelError> {
        EndpointTls::accept_until(self, tcp, door, ending).await
    }

    fn status(&self) -> serde_json::Value {
        serde_json::to_value(EndpointTls::status(self)).unwrap_or_default()
    }

    fn reloaded(&self) {
        EndpointTls::reloaded(self);
    }

    fn is_stale(&self) -> bool {
        EndpointTls::is_stale(self)
    }

    fn peers(&self) -> Option<Standings> {
        Some(EndpointTls::peers(self))
    }

    fn take_over(&self, peers: &Standings) {
        EndpointTls::take_over(self, peers);
    }
}
