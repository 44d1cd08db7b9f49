//! nginx in a member: a real server, answering who it is and whom it saw.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::member::{Family, Member};
use crate::process::Process;

/// A running nginx. Each answer is the line
/// `pod=<member's name> client=<address as seen> server=<address asked at>`.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    member: Member,
    port: u16,
}

impl Nginx {
    pub(crate) fn start(member: &Member, port: u16) -> Result<Self> {
        let prefix = member.folder().join(format!("nginx-{port}"));
        fs::create_dir(&prefix)
            .with_context(|| format!("an nginx on port {port} of {} was there already", member.name()))?;
        let path = prefix.join("nginx.conf");
        fs::write(&path, configuration(member.name(), port))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let mut process = member
            .command("nginx")?
            .arg("-p")
            .arg(&prefix)
            .args(["-e", "stderr", "-c", "nginx.conf"])
            .spawn()?;
        let url = format!("http://127.0.0.1:{port}/");
        process.wait_ready("nginx answering", Duration::from_secs(5), |_| {
            let output = member.run(&["curl", "-sS", "--max-time", "1", &url])?;
            output.success().map(Some)
        })?;
        Ok(Self { process, member: member.clone(), port })
    }

    /// Its address in a family: the member's.
    pub fn address(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.member.ip(family), self.port)
    }

    /// Its process; dropping this ends it.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// What an nginx of the lab said: who answered, and whom it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NginxAnswer {
    /// The member that answered.
    pub pod: String,
    /// The client's address as nginx saw it.
    pub client: String,
    /// The address that nginx was asked at.
    pub server: String,
}

impl NginxAnswer {
    /// Reads an answer.
    ///
    /// # Errors
    /// When it is not from an nginx of the lab.
    pub fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            text.split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
                .map(str::to_owned)
                .with_context(|| format!("no {name} in the answer {text:?}"))
        };
        Ok(Self { pod: field("pod")?, client: field("client")?, server: field("server")? })
    }
}

fn configuration(name: &str, port: u16) -> String {
    // Every path is in the prefix: nothing of the machine's nginx is touched.
    format!(
        "daemon off;\n\
         user root;\n\
         worker_processes 1;\n\
         pid nginx.pid;\n\
         error_log stderr warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
         \x20 access_log access.log;\n\
         \x20 client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;\n\
         \x20 uwsgi_temp_path uwsgi; scgi_temp_path scgi;\n\
         \x20 default_type text/plain;\n\
         \x20 keepalive_timeout 3600s; keepalive_requests 1000000;\n\
         \x20 server {{\n\
         \x20   listen {port} backlog=4096; listen [::]:{port} ipv6only=on backlog=4096;\n\
         \x20   location / {{ return 200 \"pod={name} client=$remote_addr server=$server_addr\\n\"; }}\n\
         \x20 }}\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let answer = NginxAnswer::parse("pod=a1 client=192.0.2.11 server=10.244.1.10\n").unwrap();
        assert_eq!(answer.client, "192.0.2.11");
        assert!(NginxAnswer::parse("<html>502 Bad Gateway</html>").is_err());
    }
}
