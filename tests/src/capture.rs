//! Captures: tcpdump in a member, to a file that can be counted and kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::member::Member;
use crate::process::Process;
use crate::wait::wait_for;

/// A running capture; it ends when dropped, its file stays in the member's folder.
#[derive(Debug)]
pub struct Capture {
    member: Member,
    process: Process,
    file: PathBuf,
}

impl Capture {
    pub(crate) fn start(member: &Member, interface: &str, filter: &str) -> Result<Self> {
        let mut process = member
            .command("tcpdump")?
            // Packets are written one by one, to a file that needs no other user.
            .args(["-n", "--immediate-mode", "-U", "-Z", "root", "-i", interface])
            .args(["-w", "-"])
            .arg(filter)
            .spawn()?;
        process.wait_ready("tcpdump listening", Duration::from_secs(5), |process| {
            Ok(process.stderr().contains("listening on").then_some(()))
        })?;
        let file = process.stdout_path();
        Ok(Self { member: member.clone(), process, file })
    }

    /// The file, in pcap format.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// How many packets are in it by now. A packet that just passed may not be in it yet: to wait
    /// for one, use [`Capture::wait_count`]; to know that there is none, [`Capture::stop`] first.
    ///
    /// # Errors
    /// When tcpdump cannot read it.
    pub fn count(&self) -> Result<usize> {
        Ok(self.packets()?.len())
    }

    /// The packets in it by now, a line each, as tcpdump prints them.
    ///
    /// # Errors
    /// When tcpdump cannot read it.
    pub fn packets(&self) -> Result<Vec<String>> {
        let output = self.member.command("tcpdump")?.args(["-n", "-r"]).arg(&self.file).run()?;
        // A file that is being written may end within a packet.
        if !output.status.success() && !output.stderr.contains("truncated dump file") {
            output.success()?;
            return Ok(Vec::new());
        }
        Ok(output.stdout.lines().map(str::to_owned).collect())
    }

    /// The frames in it by now, as they came: with VLAN tags.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let file = fs::read(&self.file)?;
        // pcap-savefile(5): a header of 24 octets, then for each frame one of 16, whose third word is the length.
        let mut rest = file.get(24..).unwrap_or_default();
        let mut frames = Vec::new();
        while let Some((header, behind)) = rest.split_at_checked(16) {
            let length = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
            // One that is being written.
            let Some((frame, next)) = behind.split_at_checked(length) else { break };
            frames.push(frame.to_vec());
            rest = next;
        }
        Ok(frames)
    }

    /// Waits until at least `wanted` packets are in it.
    ///
    /// # Errors
    /// When the deadline passes.
    pub fn wait_count(&self, wanted: usize, deadline: Duration) -> Result<usize> {
        wait_for("packets in the capture", deadline, || {
            let count = self.count()?;
            Ok((count >= wanted).then_some(count))
        })
    }

    /// Ends it in an orderly way, with everything that passed until now in the file, and returns
    /// how many packets that are.
    ///
    /// # Errors
    /// When tcpdump does not end.
    pub fn stop(&mut self) -> Result<usize> {
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(Duration::from_secs(5)).context("ending a capture")?;
        self.count()
    }
}
