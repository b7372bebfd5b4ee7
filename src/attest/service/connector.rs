//! Connections to the attestation service, with the mark that keeps them out of this host's own captures.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use crate::config::TargetHost;
use crate::relay::{Dialer, Refusal, Source, Target};

/// Connects as the endpoint itself does. hyper's own connector cannot mark a socket.
#[derive(Debug, Clone)]
pub struct Connector(pub Dialer);

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = Refusal;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Refusal>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refusal>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.0;
        Box::pin(async move {
            let tcp = dialer.connect(&target(&uri), Source::Own).await?;
            let _ = tcp.set_nodelay(true);
            Ok(TokioIo::new(tcp))
        })
    }
}

/// Host and port of an absolute URI.
pub fn target(uri: &Uri) -> Target {
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    // An IPv6 address stands in brackets in a URI only.
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let host = host.parse().map_or_else(|_| TargetHost::Name(host.to_owned()), TargetHost::Addr);
    Target { host, port }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use socket2::SockRef;
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::DEFAULT_INGRESS_MARK;
    use crate::relay::MarkPolicy;

    fn connector(mark: MarkPolicy) -> Connector {
        Connector(Dialer { mark, connect_timeout: Duration::from_secs(2), unacknowledged_timeout: Duration::ZERO })
    }

    // Needs CAP_NET_RAW, as the data plane does.
    #[tokio::test]
    async fn its_sockets_carry_the_mark() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        for (mark, seen) in
            [(MarkPolicy::Required(DEFAULT_INGRESS_MARK), DEFAULT_INGRESS_MARK.0), (MarkPolicy::Unmarked, 0)]
        {
            for host in ["127.0.0.1", "localhost"] {
                let uri = format!("http://{host}:{port}/attestation").parse().expect("uri");
                let io = connector(mark).call(uri).await.expect("connect");
                assert_eq!(SockRef::from(io.inner()).mark().expect("mark"), seen, "{host}");
            }
        }
    }

    #[test]
    fn every_form_of_authority_is_understood() {
        let of = |uri: &str| target(&uri.parse().expect("uri")).to_string();
        assert_eq!(of("http://as.example/x"), "as.example:80");
        assert_eq!(of("https://as.example/x"), "as.example:443");
        assert_eq!(of("http://192.0.2.1:8080/x"), "192.0.2.1:8080");
        let v6 = target(&"https://[2001:db8::1]:8443/x".parse().expect("uri"));
        assert_eq!(v6.host, TargetHost::Addr("2001:db8::1".parse().expect("address")));
        assert_eq!(v6.port, 8443);
    }
}
