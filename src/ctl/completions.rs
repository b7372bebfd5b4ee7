//! Shell completions: what `clap` generates for the commands that are meant for people, and the names of the instances.

use clap::Command;
use clap_complete::Shell;

/// Commands of `tngctl` and `tngd` that take the name of an instance.
const NAMED: [&str; 9] = ["status", "check", "rules", "connections", "reload", "doctor", "run", "serve", "guard"];

/// The completion script of `program` for `shell`; `command` describes it. Hidden commands are left out.
pub fn script(program: &'static str, command: &Command, shell: Shell) -> String {
    let shown = command.get_subcommands().filter(|c| !c.is_hide_set()).cloned().collect::<Vec<_>>();
    let named: Vec<_> = shown.iter().map(|c| c.get_name().to_owned()).filter(|n| NAMED.contains(&&**n)).collect();
    let mut visible = Command::new(program)
        .version(env!("CARGO_PKG_VERSION"))
        .args(command.get_arguments().cloned())
        .subcommands(shown)
        .disable_help_subcommand(true);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible, program, &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    match shell {
        Shell::Bash => script + &bash(program, &named),
        Shell::Zsh => zsh(program, script),
        Shell::Fish => script + &fish(program, &named),
        _ => script,
    }
}

/// Behind the generated function, one that adds names where a command takes one.
fn bash(program: &str, named: &[String]) -> String {
    let commands = named.join("|");
    format!(
        r#"
_{program}_instances() {{
    local file
    for file in "${{TNG_CONFIG_DIR:-/etc/tng}}"/*.toml; do
        file=${{file##*/}}
        [[ "$file" == "*.toml" ]] || printf '%s\n' "${{file%.toml}}"
    done
}}

_{program}_named() {{
    _{program} "$@"
    local cur="${{COMP_WORDS[COMP_CWORD]}}"
    if [[ ${{COMP_CWORD}} -gt 1 && "$cur" != -* ]]; then
        case "${{COMP_WORDS[1]}}" in
            {commands})
                COMPREPLY=( $(compgen -W "$(_{program}_instances)" -- "$cur") )
                ;;
        esac
    fi
}}

complete -F _{program}_named -o nosort -o bashdefault -o default {program}
"#
    )
}

/// The generated script completes a positional argument that it knows nothing of with `_default`.
fn zsh(program: &str, script: String) -> String {
    let function = format!(
        r#"
_{program}_instances() {{
    local -a names
    names=(${{TNG_CONFIG_DIR:-/etc/tng}}/*.toml(N:t:r))
    compadd -a names
    _files -g '*.toml'
}}
"#
    );
    let named = format!(":_{program}_instances'");
    let positional = |line: &str| line.starts_with("':") || line.starts_with("'*:");
    let with_names = |line: &str| {
        if positional(line.trim_start()) { line.replace(":_default'", &named) } else { line.to_owned() }
    };
    let script: String = script.lines().map(|line| with_names(line) + "\n").collect();
    // The file's last lines call its function at once, when it is autoloaded.
    match script.find("\nif [ \"$funcstack[1]\"") {
        Some(at) => format!("{}{function}{}", &script[..at], &script[at..]),
        None => script + &function,
    }
}

fn fish(program: &str, named: &[String]) -> String {
    format!(
        r#"
function __{program}_instances
    set -l dir /etc/tng
    set -q TNG_CONFIG_DIR; and set dir $TNG_CONFIG_DIR
    for file in $dir/*.toml
        basename $file .toml
    end
end
complete -c {program} -n "__fish_seen_subcommand_from {commands}" -a "(__{program}_instances)" -d instance
"#,
        commands = named.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command as Process;

    use clap::Arg;

    use super::*;

    fn tool() -> Command {
        Command::new("tngctl")
            .subcommand(Command::new("status").arg(Arg::new("name")).arg(Arg::new("json").long("json").num_args(0)))
            .subcommand(Command::new("reload").arg(Arg::new("instance").required(true)))
            .subcommand(Command::new("probe-agent").hide(true))
            .subcommand(Command::new("version-of").arg(Arg::new("user").long("user")))
    }

    #[test]
    fn what_is_hidden_is_not_offered_and_names_are() {
        for (shell, sign) in [
            (Shell::Bash, "status|reload)"),
            (Shell::Zsh, ":_tngctl_instances'"),
            (Shell::Fish, "__fish_seen_subcommand_from status reload"),
        ] {
            let script = script("tngctl", &tool(), shell);
            assert!(!script.contains("probe-agent") && !script.contains("probe_agent"), "{shell}: {script}");
            assert!(script.contains("version-of"), "{shell}: {script}");
            assert!(script.contains(sign), "{shell}: no {sign} in {script}");
            let option = script.lines().find(|line| line.trim_start().starts_with("'--user="));
            assert!(option.is_none_or(|line| !line.contains("instances")), "{option:?}");
        }
    }

    /// What bash would offer for these words, the last of which is being typed.
    fn offered(words: &[&str], dir: &std::path::Path) -> Vec<String> {
        let file = dir.join("completions");
        std::fs::write(&file, script("tngctl", &tool(), Shell::Bash)).unwrap();
        let program = format!(
            "source {file}\nCOMP_WORDS=({words})\nCOMP_CWORD={at}\n_tngctl_named tngctl '{cur}' '{prev}'\n\
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            file = file.display(),
            words = words.iter().map(|w| format!("'{w}'")).collect::<Vec<_>>().join(" "),
            at = words.len() - 1,
            cur = words[words.len() - 1],
            prev = words[words.len() - 2],
        );
        let out = Process::new("bash").args(["-c", &program]).env("TNG_CONFIG_DIR", dir).output().expect("bash");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let mut offered: Vec<_> = String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect();
        offered.retain(|o| !o.is_empty());
        offered.sort();
        offered
    }

    #[test]
    fn bash_offers_the_files_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(offered(&["tngctl", "status", ""], dir.path()).is_empty(), "a directory without instances");
        for name in ["web.toml", "db.toml", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(offered(&["tngctl", "status", ""], dir.path()), ["db", "web"]);
        assert_eq!(offered(&["tngctl", "reload", "w"], dir.path()), ["web"]);
        assert!(offered(&["tngctl", "version-of", "w"], dir.path()).is_empty(), "it takes no instance");
        let options = offered(&["tngctl", "status", "--"], dir.path());
        assert!(options.contains(&"--json".to_owned()), "{options:?}");
        assert_eq!(offered(&["tngctl", "rel"], dir.path()), ["reload"]);
    }
}
