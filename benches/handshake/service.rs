//! The attestation service: tests' fake, which decodes evidence, recomputes its report data and signs a token for each
//! appraisal, in a process of its own, so that what it costs is nobody else's.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;

use url::Url;

use crate::Outcome;
use crate::fakes::as_rest::{FakeAs, Mode};

/// Makes this program the service.
pub const ARGUMENT: &str = "--attestation-service";
/// Its tokens outlive every run, seconds.
const TOKEN_LIFETIME: u64 = 24 * 3600;

/// The service, running. It ends when its standard input does, so also when this process is killed.
pub struct Service {
    /// Where it is.
    pub url: Url,
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Service {
    /// Starts it and waits until it listens.
    pub fn start() -> Outcome<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let questions = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().ok_or("no output of the service")?);
        let url = line(&mut answers)?.parse()?;
        Ok(Self { url, child, questions, answers })
    }

    /// Appraisals that it was asked for so far.
    pub fn appraisals(&mut self) -> Outcome<u64> {
        self.questions.as_mut().ok_or("the service is gone")?.write_all(b"\n")?;
        Ok(line(&mut self.answers)?.parse()?)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.questions.take());
        let _ = self.child.wait();
    }
}

fn line(from: &mut impl BufRead) -> Outcome<String> {
    let mut text = String::new();
    if from.read_line(&mut text)? == 0 {
        return Err("the attestation service has ended".into());
    }
    Ok(text.trim_end().to_owned())
}

/// Serves until standard input ends; each line of it is answered with the number of appraisals so far.
pub async fn serve() -> ExitCode {
    let service = Arc::new(FakeAs::start("127.0.0.1:0", Mode::Short(TOKEN_LIFETIME)).await);
    println!("{}", service.url());
    let asked = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines() {
            line?;
            let mut out = std::io::stdout();
            writeln!(out, "{}", service.appraisals())?;
            out.flush()?;
        }
        std::io::Result::Ok(())
    });
    if asked.await.is_ok_and(|outcome| outcome.is_ok()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
