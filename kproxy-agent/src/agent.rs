//! `kproxy agent`: ties the stages together. One task owns the model, the tables and the programs, and takes in
//! one event after the other; sources and devices are tasks of their own.

pub(crate) mod config;
mod conntrack;
mod flows;
mod health_checks;
mod host;
mod listeners;
mod measures;
mod surroundings;
mod sync;
mod telemetry;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use kproxy_common::{Address, Config, LAYOUT_VERSION, Owner, map_names};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    cli::{AgentArgs, Common},
    devices::{self, BridgeFrames, Devices, Selection},
    events::{EventReason, Events},
    firewall,
    maps::kernel::{KernelMaps, OptedOutMap, owner_text},
    model::{Change, LocalAddresses, Model, NodeConfig, leftover_of},
    node::{self, Lock},
    opt_outs::OptOuts,
    programs::{Attached, Programs, has_tcx, namespace_cookie},
    source::{Event, kubernetes, manifests},
    source_routes::{self, SourceRule},
};
use config::Watched;
use flows::FlowCare;
use health_checks::HealthChecks;
pub(crate) use host::net_sysctls;
use listeners::Listeners;
use sync::Syncer;
use telemetry::Telemetry;

/// How often the sysctls of bridges are looked at, which others set at any time: a module that is loaded, a CNI that starts.
const LOOK_AT_BRIDGES: Duration = Duration::from_secs(2);

/// The ports that clients are masqueraded with before others are: the first, and how many.
pub(crate) const RESERVED_PORTS: (u32, u32) = (config::RESERVED_PORTS_FIRST, config::RESERVED_PORTS_COUNT);

/// Whether these, as `ip_local_reserved_ports` lists them, are reserved.
pub(crate) fn reserved_ports_cover(reserved: &str) -> bool {
    let (first, count) = RESERVED_PORTS;
    host::covers(reserved, first, first + count - 1)
}

/// Runs the agent until it is told to stop. The dataplane stays.
pub fn run(common: &Common, args: &AgentArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(common, args))
}

async fn serve(common: &Common, args: &AgentArgs) -> Result<()> {
    let mut stop = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    let node_name = config::node_name(&args.node)?;
    // Wrong flags are told before anything is touched.
    config::model(&node_name, &args.node, &args.rules, LocalAddresses::default())?;
    config::programs(&args.node, &args.rules, 0, [0, 0], false, &[], &Watched::NOTHING)?;
    telemetry::addresses(args)?;
    node::demand_capabilities()?;
    let cgroup = node::cgroup_root(args.cgroup.cgroup_root.as_deref())?;
    let root = common.bpf_root.as_path();
    host::lift_memory_limit();
    crate::programs::check_bpf_root(root)?;
    let _lock = Lock::take(root, || owner_text(root))?;
    let forward_mark = if args.rules.accept_forward { firewall::FORWARD_MARK } else { 0 };
    let programs = Programs::load(root, &config::capacities(&args.tables), forward_mark)?;
    let pin = |name: &str| programs.pin(name).unwrap_or_else(|| root.join(name));
    let mut maps = KernelMaps::open_pins(pin)?;
    maps.write_owner(&owner(&node_name))?;
    let (mut tables, problems) = maps.restore()?;
    if programs.replace_tables() {
        // Flows, affinity and sockets of the time before carry identities too.
        tables.skip_identities(config::random()[0]);
    }
    for problem in problems {
        tracing::warn!("the maps held what does not fit together, and it is written anew: {problem}");
    }
    host::reserve_ports(config::RESERVED_PORTS_FIRST, config::RESERVED_PORTS_COUNT);
    if !args.rules.disable_conntrack_sysctls {
        conntrack::set_sysctls(net_sysctls());
    }

    let (sender, mut device_events) = mpsc::channel(4);
    let mut watcher = tokio::spawn(devices::watch(sender));
    let mut filter_events = devices::watch_filters().context("cannot listen for changes of filters")?;
    let first = device_events.recv().await.context("cannot follow the interfaces")?;
    let (sender, mut rule_events) = mpsc::channel(4);
    let (own_rules, wanted_rules) = watch::channel(None);
    let mut rule_watcher = tokio::spawn(source_routes::follow(sender, wanted_rules));
    let source_rules = rule_events.recv().await.context("cannot follow the routing rules")?;
    let local = local_addresses(&first);
    let cookie = namespace_cookie().context("cannot tell this network namespace")?.unwrap_or(0);
    let model = Model::new(NodeConfig {
        has_netns_cookies: cookie != 0,
        ..config::model(&node_name, &args.node, &args.rules, local)?
    });
    let connection = connect(args).await?;
    let events = match &connection {
        Some(connection) => Events::start(kubernetes::Recorder::new(connection, &node_name), &node_name),
        None => Events::none(),
    };
    surroundings::look(&events, args.rules.accept_forward);
    let opted_out = OptedOutMap::open(&pin(map_names::OPTED_OUT))?;
    let opt_outs = OptOuts::start(opted_out, cgroup.clone(), cookie, events.clone())?;
    let some_opted_out = maps.read_config()?.some_opted_out != 0;
    let telemetry = Telemetry::start(args, &node_name, root, &events)?;
    let mut agent = Agent {
        args,
        bpf_root: root,
        model,
        health_checks: telemetry.health_checks(),
        syncer: Syncer::new(tables, maps),
        attached: Attached::new(root, !has_tcx())?,
        programs,
        devices: first,
        cgroup,
        cookie,
        is_synced: false,
        is_attached: false,
        attached_as: Vec::new(),
        failed_devices: BTreeMap::new(),
        bridge_frames: BridgeFrames::read(),
        listeners: Listeners::default(),
        leftovers: BTreeSet::new(),
        source_rules,
        rules_for_backends: Vec::new(),
        own_rules,
        flows: FlowCare::default(),
        opt_outs,
        some_opted_out,
        watched: Watched::NOTHING,
        telemetry,
        events,
        has_write_failures: false,
        loading: Loading { started: Instant::now(), objects: 0, parsing: Duration::ZERO },
    };
    tracing::info!(
        node = node_name,
        cgroup = %agent.cgroup.display(),
        bpf_root = %root.display(),
        tcx = has_tcx(),
        "starting: the maps hold {} frontends",
        agent.syncer.frontends()
    );
    agent.tell_leftovers();
    let mut source = match &connection {
        Some(connection) => kubernetes::watch(connection, &node_name),
        None => manifests::follow(&args.source.manifests, &node_name),
    };
    let mut look_again = tokio::time::interval(LOOK_AT_BRIDGES);
    look_again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let timer = agent.syncer.next_try();
        tokio::select! {
            event = source.next() => {
                let event = event.context("the source of Services has ended unexpectedly")?;
                agent.on_event(event)?;
            }
            devices = device_events.recv() => match devices {
                Some(devices) => agent.on_devices(devices)?,
                None => return (&mut watcher).await.context("the interfaces are no longer followed")?,
            },
            rules = rule_events.recv() => match rules {
                Some(rules) => agent.on_source_rules(rules)?,
                None => return (&mut rule_watcher).await.context("the routing rules are no longer followed")?,
            },
            () = wait_until(timer) => agent.sync()?,
            _ = look_again.tick() => agent.look_again(),
            Some(()) = filter_events.recv() => agent.verify_attached(),
            () = wait_until_instant(agent.listeners.next_look()) => agent.look_at_listeners()?,
            () = wait_until_instant(agent.flows.next_step()) => agent.flows.step(agent.telemetry.metrics()),
            _ = stop.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("stopping: maps and programs stay, and go on working");
    Ok(())
}

struct Agent<'a> {
    args: &'a AgentArgs,
    bpf_root: &'a std::path::Path,
    model: Model,
    health_checks: HealthChecks,
    syncer: Syncer<KernelMaps>,
    programs: Programs,
    attached: Attached,
    devices: Devices,
    cgroup: std::path::PathBuf,
    cookie: u64,
    is_synced: bool,
    is_attached: bool,
    /// The node's own addresses, as interfaces were last looked at: which of them lead to pods, and what clients are
    /// masked with, depends on these.
    attached_as: Vec<Address>,
    failed_devices: BTreeMap<String, String>,
    bridge_frames: BridgeFrames,
    listeners: Listeners,
    leftovers: BTreeSet<String>,
    /// All rules of this node that route by source, and those that route what backends here send.
    source_rules: Vec<SourceRule>,
    rules_for_backends: Vec<SourceRule>,
    /// Before which of them the agent's own rule is to stand.
    own_rules: watch::Sender<Option<source_routes::Before>>,
    flows: FlowCare,
    opt_outs: OptOuts,
    /// Whether the programs are to ask which pods are opted out.
    some_opted_out: bool,
    /// What the programs are told of the node's addresses and NodePorts.
    watched: Watched,
    telemetry: Telemetry,
    events: Events,
    /// Whether the last sync left something unwritten.
    has_write_failures: bool,
    loading: Loading,
}

/// How the first full lists came in.
struct Loading {
    started: Instant,
    /// Services, EndpointSlices and the rest.
    objects: u64,
    /// What it took to turn them into the model's values.
    parsing: Duration,
}

impl Agent<'_> {
    fn on_event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Change(change) => {
                let news = self.telemetry.seen(&change);
                self.loading.objects += u64::from(!matches!(change, Change::AllPods));
                let start = Instant::now();
                let is_known = self.model.take_in(change);
                self.loading.parsing += start.elapsed();
                if !is_known {
                    self.telemetry.waits(news);
                }
            }
            Event::Synced => {
                self.is_synced = true;
                let Loading { started, objects, parsing } = &self.loading;
                let (read_us, parse_us) = (micros(started.elapsed()), micros(*parsing));
                tracing::info!(objects, read_us, parse_us, "the first full lists are here");
            }
            Event::Problem(problem) => self.telemetry.source_problem(problem),
            Event::Watch(state) => self.telemetry.watch_is(state),
            Event::Flush => self.sync()?,
        }
        Ok(())
    }

    fn on_devices(&mut self, devices: Devices) -> Result<()> {
        let before = local_addresses(&self.devices);
        self.devices = devices;
        self.tell_leftovers();
        let now = local_addresses(&self.devices);
        if self.is_attached {
            self.attach_devices();
            // A pod's sandbox may be another now.
            if self.some_opted_out {
                self.opt_outs.look();
            }
        }
        if before != now {
            self.model.apply(Change::LocalAddresses(now));
            self.sync()?;
        }
        Ok(())
    }

    /// Computes what follows from the events so far, and writes it. The first time, the programs are attached
    /// afterwards: what they would find before is not yet what it should be.
    fn sync(&mut self) -> Result<()> {
        if !self.is_synced {
            return Ok(());
        }
        let started = Instant::now();
        if let Some(found) = self.listeners.follow(self.model.standing_cluster_ips()) {
            self.model.apply(Change::Listeners(found));
        }
        let mut update = self.model.recompute();
        let compute = started.elapsed();
        for problem in &update.new_problems {
            tracing::warn!(
                kind = problem.kind.word(),
                object = %problem.object,
                field = problem.field,
                "{}",
                problem.message
            );
        }
        for problem in &update.gone_problems {
            tracing::info!(object = %problem.object, field = problem.field, "resolved: {}", problem.message);
        }
        self.events.problems(&update.new_problems, &update.gone_problems);
        let are_routes_new = self.look_at_source_rules();
        let some_opted_out = self.some_opted_out;
        if let Some(opt_outs) = &update.opt_outs {
            // Before all Pods are known, what an earlier agent wrote stands.
            self.some_opted_out = !opt_outs.pods.is_empty() || !opt_outs.is_complete && some_opted_out;
            self.opt_outs.want(opt_outs.clone());
        }
        if update.node.is_some() || self.some_opted_out != some_opted_out || are_routes_new {
            self.write_config()?;
        }
        let looked_at = update.services.len();
        let changed = update.services.keys().cloned().collect();
        let has_news = looked_at > 0 || update.node.is_some() || !self.is_attached;
        if has_news {
            self.telemetry.queued();
        }
        self.telemetry.computed(&update.services);
        self.health_checks.note(std::mem::take(&mut update.health_checks), update.node.as_ref());
        let start = Instant::now();
        let report = self.syncer.sync(update, SystemTime::now());
        let syncing = start.elapsed();
        if self.watched != self.watched_now() {
            self.write_config()?;
        }
        for (party, error) in &report.failed {
            tracing::error!(service = %party, "cannot be written and is tried again: {error}");
        }
        if !report.failed.is_empty() || self.has_write_failures {
            self.events.write_failures(self.syncer.failed());
            self.has_write_failures = self.syncer.failed().next().is_some();
        }
        let is_first = !self.is_attached;
        if is_first {
            if self.some_opted_out {
                self.opt_outs.finish();
            }
            self.attach()?;
        } else if self.model.node_addresses() != self.attached_as {
            self.attach_devices();
        }
        self.flows.synced(self.syncer.tables(), changed, &report);
        // After the first time's attaching: a load balancer that is answered sends at once.
        self.health_checks.answer(|service| self.syncer.is_written(service));
        self.telemetry.synced(&report, &self.syncer, &self.model, is_first, started.elapsed());
        let (services, frontends) = (self.syncer.services(), self.syncer.frontends());
        let (writes, calls, failed) = (report.counts.writes(), report.calls, report.failed.len());
        let writing = report.times.iter().map(|step| step.time).sum::<Duration>();
        let (compute_us, plan_us, write_us) =
            (micros(compute), micros(syncing.saturating_sub(writing)), micros(writing));
        let total_us = micros(started.elapsed());
        // A change of state where something was written, else of no interest but to who waits for it.
        if has_news || writes > 0 {
            tracing::info!(
                services,
                frontends,
                changed = looked_at,
                writes,
                calls,
                failed,
                compute_us,
                plan_us,
                write_us,
                total_us,
                "synced"
            );
        } else {
            tracing::debug!(
                services,
                frontends,
                changed = 0,
                writes,
                calls,
                failed,
                compute_us,
                plan_us,
                write_us,
                total_us,
                "synced"
            );
        }
        // Off the critical path: what was just written is in force already.
        if !self.syncer.settle(SystemTime::now()) {
            self.telemetry.cleanup_failed();
        }
        if is_first {
            host::return_memory();
        }
        Ok(())
    }

    fn write_config(&mut self) -> Result<()> {
        let seed = self.syncer.maps().hash_seed()?;
        let service_cidrs = self.model.wanted_node().map_or(&[][..], |node| &node.service_cidrs);
        let (node, rules) = (&self.args.node, &self.args.rules);
        self.watched = self.watched_now();
        let (some_opted_out, watched) = (self.some_opted_out, &self.watched);
        let config =
            config::programs(node, rules, self.cookie, seed, some_opted_out, service_cidrs, watched)?;
        let routes_by_source = u16::from(!self.rules_for_backends.is_empty());
        Ok(self.syncer.maps().write_config(&Config { routes_by_source, ..config })?)
    }

    fn watched_now(&self) -> Watched {
        let addresses = self.devices.values().flat_map(|device| &device.addresses);
        Watched::of(addresses, self.syncer.tables().node_ports())
    }

    fn attach(&mut self) -> Result<()> {
        self.attached.keep_parts(&self.programs)?;
        let carries = self.programs.carries()?;
        for carry in &carries {
            carry.copy()?;
        }
        let since = crate::flows::now().context("cannot tell the time since boot")?;
        let catch_up = || carries.iter().try_for_each(|carry| carry.finish(since));
        self.attached.socket_hooks(&mut self.programs, &self.cgroup)?;
        self.is_attached = true;
        catch_up()?;
        self.attach_devices();
        catch_up()?;
        if !carries.is_empty() {
            // Once more when no program holds the old tables.
            crate::maps::grace_period().context("cannot wait for a grace period")?;
            catch_up()?;
        }
        self.programs.maps_take_place()?;
        self.flows.start(&mut self.programs, self.bpf_root, &self.cgroup);
        tracing::info!(interfaces = self.attached.device_count(), "attached");
        Ok(())
    }

    fn attach_devices(&mut self) {
        let selection =
            Selection { only: self.args.devices.clone(), exclude: self.args.exclude_devices.clone() };
        self.attached_as = self.model.node_addresses().to_vec();
        let wanted = devices::hooked(&self.devices, &selection);
        let all = self.devices.iter().map(|(index, device)| (*index, device.name.as_str()));
        self.attached.sweep(&wanted, all);
        // Before the programs that need them: a new interface's first packet is masqueraded.
        self.bridge_frames = BridgeFrames::read();
        self.set_masks();
        let failed: BTreeMap<String, String> = self
            .attached
            .devices(&mut self.programs, &wanted)
            .into_iter()
            .map(|(device, error)| (device, format!("{error:#}")))
            .collect();
        for (device, error) in &failed {
            // An interface that is gone already is no news; the kernel will say so.
            if self.failed_devices.get(device) != Some(error) {
                tracing::warn!(interface = device, "has no packet programs: {error}");
            }
        }
        if failed.is_empty() {
            self.attached.forget_earlier_parts();
        }
        self.failed_devices = failed;
    }

    fn look_again(&mut self) {
        self.look_at_bridges();
        self.verify_attached();
    }

    /// Puts back what somebody has taken off, and tries again what could not be attached.
    fn verify_attached(&mut self) {
        if !self.is_attached {
            return;
        }
        let before = self.attached.device_count();
        for what in self.attached.verify(&mut self.programs, &self.cgroup) {
            tracing::warn!("somebody has taken off {what}: attached again");
        }
        if !self.failed_devices.is_empty() || self.attached.device_count() != before {
            self.attach_devices();
        }
    }

    /// Notices that somebody has set what netfilter sees of bridges: of that the kernel tells nobody.
    fn look_at_bridges(&mut self) {
        let now = BridgeFrames::read();
        if now == self.bridge_frames {
            return;
        }
        let BridgeFrames { filtered_v4, filtered_v6 } = now;
        tracing::info!(
            ipv4 = filtered_v4,
            ipv6 = filtered_v6,
            "whether frames between two ports of a bridge pass netfilter has changed"
        );
        self.bridge_frames = now;
        if self.is_attached {
            self.set_masks();
        }
    }

    fn look_at_listeners(&mut self) -> Result<()> {
        match self.listeners.look_again() {
            Some(found) => {
                self.model.apply(Change::Listeners(found));
                self.sync()
            }
            None => Ok(()),
        }
    }

    fn on_source_rules(&mut self, rules: Vec<SourceRule>) -> Result<()> {
        self.source_rules = rules;
        if self.is_synced && self.look_at_source_rules() {
            self.write_config()?;
        }
        Ok(())
    }

    /// Whether other rules than before route what backends on this node send by its source.
    fn look_at_source_rules(&mut self) -> bool {
        let found = if self.source_rules.is_empty() {
            Vec::new()
        } else {
            let own = self.model.config().node_name.as_str();
            let here =
                self.model.endpoint_nodes().filter(|(_, node)| *node == own).map(|(address, _)| address);
            // What the node itself sends is translated by no interface that it comes in by.
            let pods = here.filter(|address| !self.model.local_addresses().contains(address)).collect();
            source_routes::for_backends(&self.source_rules, &pods)
        };
        let is_new = found != self.rules_for_backends || self.own_rules.borrow().is_none();
        if is_new {
            self.own_rules.send_replace(Some(source_routes::before(&found)));
            let text = (!found.is_empty()).then(|| {
                format!("{}; they are marked and sent by the main table", source_routes::text(&found))
            });
            if text.is_none() && !self.rules_for_backends.is_empty() {
                tracing::info!(
                    "resolved: no rule routes what backends on this node send by its source any more"
                );
            }
            surroundings::tell(&self.events, EventReason::RoutedBySource, text);
            self.rules_for_backends = found;
        }
        is_new
    }

    /// Interfaces of other proxies that came or went.
    fn tell_leftovers(&mut self) {
        let names = self.devices.values().map(|device| &device.name);
        let now = names.filter(|name| leftover_of(name).is_some()).cloned().collect();
        if self.leftovers != now {
            surroundings::tell_leftovers(&self.events, &now);
            self.leftovers = now;
        }
    }

    fn set_masks(&mut self) {
        let masks = devices::masks(&self.devices, self.bridge_frames, &self.node_addresses());
        if let Err(error) = self.programs.masks(&masks) {
            tracing::error!("clients cannot be masked on interfaces that came or changed: {error:#}");
        }
    }

    /// The node's own addresses, by which its uplink is told from pods' interfaces.
    fn node_addresses(&self) -> BTreeSet<IpAddr> {
        self.model.node_addresses().iter().copied().map(IpAddr::from).collect()
    }
}

/// Microseconds, as the log has them.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The way to the API server; `None` where objects come from files.
async fn connect(args: &AgentArgs) -> Result<Option<kubernetes::Connection>> {
    if !args.source.manifests.is_empty() {
        return Ok(None);
    }
    let settings = kubernetes::ConnectionSettings {
        kubeconfig: args.source.kubeconfig.clone(),
        api_servers: args.source.api_server.clone(),
    };
    Ok(Some(kubernetes::connect(&settings).await?))
}

fn local_addresses(devices: &Devices) -> LocalAddresses {
    let of =
        |device: &devices::Device| device.addresses.iter().copied().map(Address::from).collect::<Vec<_>>();
    let all = devices.values().flat_map(|device| of(device).into_iter().map(|ip| (ip, device.name.as_str())));
    all.collect()
}

async fn wait_until(time: Option<SystemTime>) {
    match time {
        Some(time) => {
            let left = time.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO);
            tokio::time::sleep(left).await;
        }
        None => std::future::pending().await,
    }
}

async fn wait_until_instant(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

fn owner(node_name: &str) -> Owner {
    fn padded<const N: usize>(text: &str) -> [u8; N] {
        let mut bytes = [0; N];
        let length = text.len().min(N - 1);
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        bytes
    }
    Owner {
        layout_version: LAYOUT_VERSION,
        pid: std::process::id(),
        started: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        node: padded(node_name),
        version: padded(env!("CARGO_PKG_VERSION")),
    }
}
