//! Against a server that answers by script.

use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;

const LONG: Duration = Duration::from_secs(10);

#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

struct Server {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        Self { dir, listener }
    }
    fn client(&self) -> Arc<Client> {
        Arc::new(Client::new(&self.dir.path().join("s")))
    }
    async fn accept(&self) -> UnixStream {
        self.listener.accept().await.unwrap().0
    }
}

/// Stream id and text of the next request.
async fn request(stream: &mut UnixStream) -> (u32, String) {
    let mut header = [0; 10];
    stream.read_exact(&mut header).await.unwrap();
    let mut body = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
    stream.read_exact(&mut body).await.unwrap();
    let request = wire::Request::decode(&body[..]).unwrap();
    assert_eq!((request.service.as_str(), request.timeout_nano), ("s", LONG.as_nanos() as i64));
    let id = u32::from_be_bytes(header[4..8].try_into().unwrap());
    (id, Text::decode(&request.payload[..]).unwrap().text)
}

async fn answer(stream: &mut UnixStream, id: u32, text: &str) {
    let response = wire::Response { status: None, payload: text.as_bytes().to_vec() }.encode_to_vec();
    let mut frame = (response.len() as u32).to_be_bytes().to_vec();
    frame.extend(id.to_be_bytes());
    frame.extend([2, 0]);
    frame.extend(response);
    stream.write_all(&frame).await.unwrap();
}

fn call(client: &Arc<Client>, text: &str) -> tokio::task::JoinHandle<Result<Vec<u8>, AttestError>> {
    let (client, message) = (client.clone(), Text { text: text.into() });
    tokio::spawn(async move { client.call("s", "m", &message, LONG).await })
}

#[tokio::test]
async fn concurrent_calls_share_a_connection_and_get_their_own_answers_in_any_order() {
    let server = Server::new();
    let client = server.client();
    let calls: Vec<_> = (0..100).map(|n| (n, call(&client, &n.to_string()))).collect();
    let mut stream = server.accept().await;
    // As many as go at once, answered last first; then the others.
    for batch in [64, 36] {
        let mut seen = Vec::new();
        for _ in 0..batch {
            seen.push(request(&mut stream).await);
        }
        for (id, text) in seen.iter().rev() {
            assert_eq!(id % 2, 1);
            answer(&mut stream, *id, &format!("re {text}")).await;
        }
    }
    for (n, call) in calls {
        assert_eq!(call.await.unwrap().unwrap(), format!("re {n}").into_bytes());
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_by_a_restart_is_made_again() {
    let server = Server::new();
    let client = server.client();
    let first = call(&client, "one");
    let mut stream = server.accept().await;
    request(&mut stream).await;
    drop(stream);
    let mut stream = server.accept().await;
    let (id, text) = request(&mut stream).await;
    assert_eq!((id, text.as_str()), (1, "one"));
    answer(&mut stream, id, "done").await;
    assert_eq!(first.await.unwrap().unwrap(), b"done");
}

#[tokio::test]
async fn a_server_that_hangs_up_every_time_is_unreachable_after_a_bounded_number_of_attempts() {
    let server = Server::new();
    let client = server.client();
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let refused = call(&client, "x");
    let serve = tokio::spawn(async move {
        loop {
            let mut stream = server.accept().await;
            request(&mut stream).await;
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    assert_eq!(refused.await.unwrap().unwrap_err().reason(), "aa-unreachable");
    assert_eq!(seen.load(Ordering::SeqCst), PAUSES.len());
    serve.abort();
}

#[tokio::test]
async fn a_given_up_call_blocks_nobody_and_its_late_answer_is_dropped() {
    let server = Server::new();
    let client = server.client();
    let slow = call(&client, "slow");
    let mut stream = server.accept().await;
    let (slow_id, _) = request(&mut stream).await;
    let quick = call(&client, "quick");
    let (quick_id, _) = request(&mut stream).await;
    answer(&mut stream, quick_id, "quick").await;
    assert_eq!(quick.await.unwrap().unwrap(), b"quick");
    slow.abort();
    assert!(slow.await.unwrap_err().is_cancelled());
    answer(&mut stream, slow_id, "late").await;
    let next = call(&client, "next");
    // The server said something meanwhile, so the connection is kept.
    let (next_id, text) = request(&mut stream).await;
    assert_eq!(text, "next");
    answer(&mut stream, next_id, "next").await;
    assert_eq!(next.await.unwrap().unwrap(), b"next");
}

#[tokio::test]
async fn after_a_call_to_a_server_that_says_nothing_the_next_one_takes_a_new_connection() {
    let server = Server::new();
    let client = server.client();
    let slow = call(&client, "slow");
    let mut dead = server.accept().await;
    request(&mut dead).await;
    slow.abort();
    assert!(slow.await.unwrap_err().is_cancelled());
    let next = call(&client, "next");
    let mut stream = server.accept().await;
    let (id, _) = request(&mut stream).await;
    answer(&mut stream, id, "next").await;
    assert_eq!(next.await.unwrap().unwrap(), b"next");
}

#[tokio::test]
async fn an_answer_nobody_asked_for_ends_the_connection_and_every_call_on_it() {
    for stray in [2, 99, 0] {
        let server = Server::new();
        let client = server.client();
        let calls = [call(&client, "a"), call(&client, "b")];
        let mut stream = server.accept().await;
        request(&mut stream).await;
        request(&mut stream).await;
        answer(&mut stream, stray, "?").await;
        for call in calls {
            assert_eq!(call.await.unwrap().unwrap_err().reason(), "aa-garbage", "{stray}");
        }
        let again = call(&client, "again");
        let mut stream = server.accept().await;
        let (id, _) = request(&mut stream).await;
        answer(&mut stream, id, "ok").await;
        assert_eq!(again.await.unwrap().unwrap(), b"ok");
    }
}
