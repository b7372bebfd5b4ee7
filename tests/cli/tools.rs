//! Commands on the client host of a world.

use super::netns::{Host, Output, run, tngctl, tngd};

/// Writes `toml` as instance `name` and returns the path.
pub fn write(host: &Host, name: &str, toml: &str) -> String {
    let file = host.config_dir().join(format!("{name}.toml"));
    std::fs::write(&file, toml).expect("write the configuration");
    file.to_string_lossy().into_owned()
}

/// `tngd ARGS` to its end.
pub fn daemon(host: &Host, args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = host.command(tngd(), args);
    command.envs(env.iter().copied());
    run(command)
}

/// `tngctl ARGS` to its end.
pub fn ctl(host: &Host, args: &[&str]) -> Output {
    run(host.command(tngctl(), args))
}

/// The exit status and a part of the message, or a panic with all that was said.
#[track_caller]
pub fn expect(out: &Output, status: i32, parts: &[&str]) {
    assert_eq!(out.status.code(), Some(status), "`{}`\n{}{}", out.command, out.stdout, out.stderr);
    for part in parts {
        let said = out.stderr.contains(part) || out.stdout.contains(part);
        assert!(said, "`{}` does not say {part:?}:\n{}{}", out.command, out.stdout, out.stderr);
    }
}
