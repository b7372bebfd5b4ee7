//! tngd(8): the daemon and its privileged commands.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tng::attest::host::HostProvider;
use tng::attest::tpm::transport::TpmAddress;
use tng::capture::{apply, on_host};
use tng::daemon::evidence_command::{self, EvidenceOptions};
use tng::daemon::guard_command::{self, GuardOptions};
use tng::daemon::lifecycle::{self, ServeOptions};
use tng::daemon::supervisor;
use tng::instance::Paths;
use tng::os::privileges::{find_user, may_administer_network};
use tng::{config, daemon, output, units};

/// Puts unmodified TCP applications behind attested TLS.
#[derive(Parser)]
#[command(name = "tngd", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a configuration: every error at once, with file, line, column and a hint
    Check {
        /// Instance names (/etc/tng/NAME.toml) or files; all of /etc/tng when absent
        #[arg(value_name = "NAME|FILE")]
        instances: Vec<String>,
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
    },
    /// Run an instance in one command: rules, guard, and the data plane in an unprivileged child
    Run {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
        /// User the data plane becomes (default: the caller)
        #[arg(long)]
        user: Option<String>,
    },
    /// Run the data plane alone; listeners from the service manager, or bound here
    Serve {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
        /// User to become once listeners are bound
        #[arg(long)]
        user: Option<String>,
        /// Process id of the tngd run that started this
        #[arg(long, hide = true)]
        supervisor: Option<u32>,
    },
    /// Apply or remove an instance's rules and routes
    Net {
        #[command(subcommand)]
        command: NetCommand,
    },
    /// Hold the fail-closed guard table and put back rules that a stranger removed
    Guard {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
        /// When the file has errors, guard by the configuration that was last up
        #[arg(long)]
        last_good: bool,
        /// User the data plane runs as (default: tng, or root where there is no such user)
        #[arg(long)]
        owner: Option<String>,
    },
    /// Make evidence of this host for one connection, which is the standard input (tng-evidence@.service)
    Evidence {
        /// Make it here and now and show it, for the peers' reference values: tsm or tpm
        #[arg(long, value_name = "PROVIDER", value_parser = evidence_command::provider)]
        show: Option<HostProvider>,
        /// Directory of the kernel's report interface
        #[arg(long, value_name = "DIRECTORY", default_value = tng::attest::host::tsm::ROOT)]
        tsm_root: std::path::PathBuf,
        /// Device of the TPM, or unix:// and the socket of a swtpm
        #[arg(long, value_name = "ADDRESS", default_value = "/dev/tpmrm0", value_parser = evidence_command::tpm_address)]
        tpm_device: TpmAddress,
        /// Attestation key: ecc, rsa, or a persistent handle as 0x81010002
        #[arg(long, value_name = "KEY", default_value = "ecc")]
        tpm_ak: String,
        /// Hierarchy of an ecc or rsa key: endorsement or owner
        #[arg(long, value_name = "HIERARCHY", default_value = "endorsement")]
        tpm_hierarchy: String,
        /// PCRs that are quoted, as 0,1,7 (default: all 24)
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        tpm_pcrs: Vec<u8>,
    },
    /// Steps of the systemd units
    #[command(hide = true)]
    Unit {
        #[command(subcommand)]
        command: UnitCommand,
    },
    /// Print shell completions
    #[command(hide = true)]
    Completions { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
enum NetCommand {
    /// First step of the socket unit: have systemd know the listeners of the file as it is now
    Prepare {
        /// Instance name (/etc/tng/NAME.toml)
        #[arg(value_name = "NAME")]
        instance: String,
        /// User the data plane runs as (default: tng, or root where there is no such user)
        #[arg(long)]
        owner: Option<String>,
    },
    /// Apply the rules and routes
    Up {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
        /// When the file has errors, take the configuration that was last up
        #[arg(long)]
        last_good: bool,
        /// User the data plane runs as (default: tng, or root where there is no such user)
        #[arg(long)]
        owner: Option<String>,
    },
    /// Remove the rules and routes, whatever state they are in
    Down {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
        /// As a step of the socket unit: leave them when the system shuts down or the unit failed, so that captured
        /// traffic is refused
        #[arg(long)]
        unless_shutdown: bool,
    },
}

#[derive(Subcommand)]
enum UnitCommand {
    /// ExecStartPre= of tng@.service
    ServiceStarting { instance: String },
    /// ExecStartPost= of tng@.service
    ServiceStarted { instance: String },
    /// ExecStopPost= of tng@.service
    ServiceStopped { instance: String },
    /// ExecStart= of tng-stopped@.service
    ServiceEnded { instance: String },
    /// ExecStopPost= of tng@.socket
    SocketStopped { instance: String },
    /// ExecStopPost= of tng-guard@.service
    GuardStopped { instance: String },
}

/// A failure with its exit status.
struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    /// The same with a line more.
    fn with(mut self, line: Option<String>) -> Self {
        if let Some(line) = line {
            self.message = format!("{}\n{line}", self.message.trim_end());
        }
        self
    }
}

macro_rules! failure_from {
    ($($error:ty),* $(,)?) => { $(
        impl From<$error> for Failure {
            fn from(e: $error) -> Self {
                let (status, text) = (e.exit_status(), e.to_string());
                // Findings of a configuration come with a line and a hint each.
                let message = if status == 78 { text } else { format!("{text} [{}]", e.reason()) };
                Self { status, message }
            }
        }
    )* };
}
failure_from!(
    lifecycle::ServeError,
    supervisor::RunError,
    guard_command::GuardCommandError,
    evidence_command::EvidenceCommandError,
    units::UnitError
);

impl From<config::Report> for Failure {
    fn from(report: config::Report) -> Self {
        Self { status: 78, message: report.to_string() }
    }
}

impl From<apply::ApplyError> for Failure {
    fn from(e: apply::ApplyError) -> Self {
        let status = match e {
            apply::ApplyError::Privilege => 77,
            apply::ApplyError::Conflict(_) => 78,
            _ => 1,
        };
        Self { status, message: format!("{e} [{}]", e.reason()) }
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    if std::path::Path::new(&program).file_name().is_some_and(|name| name == units::generator::PROGRAM) {
        // Never a failure: it would cost the boot nothing to go on, and the units say what is wrong.
        if let Some(dir) = words.next() {
            units::generator::run(std::path::Path::new(&dir));
        }
        return ExitCode::SUCCESS;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => return ExitCode::from(output::print_usage(&usage)),
    };
    let status = dispatch(cli.command).unwrap_or_else(|failure| {
        // In the order in which things happened.
        daemon::flush_logging();
        for line in failure.message.lines() {
            let prefix = if line.starts_with("tngd:") || line.starts_with(' ') { "" } else { "tngd: " };
            output::complain(&format!("{prefix}{line}"));
        }
        failure.status
    });
    daemon::flush_logging();
    ExitCode::from(status)
}

fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Check { instances, json } => {
            let answer = config::check_command("tngd", &instances, json, on_host::warnings);
            output::print(&answer.stdout);
            if !answer.stderr.is_empty() {
                output::complain(answer.stderr.trim_end());
            }
            Ok(u8::try_from(answer.code).unwrap_or(1))
        }
        Command::Run { instance, user } => {
            daemon::init_logging();
            supervisor::run(&instance, user.as_deref())?;
            Ok(0)
        }
        Command::Serve { instance, user, supervisor } => {
            daemon::prepare_logging();
            lifecycle::serve(&ServeOptions { instance, user, supervisor })?;
            Ok(0)
        }
        Command::Net { command: NetCommand::Prepare { instance, owner } } => {
            administrator()?;
            daemon::init_logging();
            let path = config::unit_path(&instance)?;
            units::prepare(&Paths::current(), &path, owner_uid(owner.as_deref())?)?;
            Ok(0)
        }
        Command::Net { command: NetCommand::Up { instance, last_good, owner } } => {
            administrator()?;
            daemon::init_logging();
            let path = if last_good { config::unit_path(&instance) } else { config::instance_path(&instance) }?;
            units::net_up(&Paths::current(), &path, last_good, owner_uid(owner.as_deref())?)
                .map_err(|e| Failure::from(e).with(units::still_up(&path)))?;
            Ok(0)
        }
        Command::Net { command: NetCommand::Down { instance, unless_shutdown } } => {
            administrator()?;
            let (paths, path) = (Paths::current(), config::instance_path(&instance)?);
            if unless_shutdown {
                daemon::init_logging();
            } else if let Some(warning) = units::net_down_warning(&paths, &path) {
                // By hand, and not a step of the socket unit that stops.
                output::complain(&format!("tngd: {warning}"));
            }
            units::net_down(&paths, &path, unless_shutdown)?;
            Ok(0)
        }
        Command::Evidence { show, tsm_root, tpm_device, tpm_ak, tpm_hierarchy, tpm_pcrs } => {
            daemon::prepare_logging();
            let options = EvidenceOptions::new(tsm_root, tpm_device, &tpm_ak, &tpm_hierarchy, tpm_pcrs)?;
            match show {
                Some(provider) => {
                    output::print(&evidence_command::show(&options, provider)?);
                }
                None => evidence_command::serve(&options)?,
            }
            Ok(0)
        }
        Command::Unit { command } => {
            daemon::init_logging();
            match command {
                UnitCommand::ServiceStarting { instance } => {
                    administrator()?;
                    let path = config::unit_path(&instance)?;
                    units::service_starting(&Paths::current(), &path, owner_uid(None)?)
                        .map_err(|e| Failure::from(e).with(units::still_up(&path)))?;
                }
                UnitCommand::GuardStopped { instance } => {
                    units::hooks::guard_stopped(&Paths::current(), &config::unit_path(&instance)?)?;
                }
                UnitCommand::ServiceStarted { instance } => {
                    units::hooks::service_started(&Paths::current(), &config::unit_path(&instance)?)?;
                }
                UnitCommand::ServiceStopped { instance } => {
                    units::hooks::service_stopped(&Paths::current(), &config::unit_path(&instance)?)?;
                }
                UnitCommand::ServiceEnded { instance } => {
                    units::hooks::service_ended(&config::unit_path(&instance)?)?;
                }
                UnitCommand::SocketStopped { instance } => {
                    units::hooks::socket_stopped(&config::unit_path(&instance)?)?;
                }
            }
            Ok(0)
        }
        Command::Guard { instance, last_good, owner } => {
            daemon::init_logging();
            guard_command::guard(&GuardOptions { instance, owner, last_good })?;
            Ok(0)
        }
        Command::Completions { shell } => {
            let script = tng::ctl::completions("tngd", &Cli::command(), shell);
            output::print(&script);
            Ok(0)
        }
    }
}

fn administrator() -> Result<(), Failure> {
    if may_administer_network() { Ok(()) } else { Err(apply::ApplyError::Privilege.into()) }
}

/// The data plane's user: as asked, else `tng` where the package made it, else root.
fn owner_uid(owner: Option<&str>) -> Result<u32, Failure> {
    match owner {
        Some(name) => find_user(name)
            .map(|(uid, _)| uid.as_raw())
            .map_err(|e| Failure { status: 67, message: format!("{e} [{}]", e.reason()) }),
        None => Ok(find_user("tng").map_or(0, |(uid, _)| uid.as_raw())),
    }
}
