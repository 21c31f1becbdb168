// The page works without this. It keeps the numbers fresh: the overview is asked for again, and a job is followed by
// server-sent events. Nothing is built from text here: the gateway sends HTML that it has escaped, and numbers.
"use strict";

const live = document.querySelector("[data-live]");
if (live) {
  const refresh = async () => {
    let pause = 2000;
    if (!document.hidden) {
      const begun = performance.now();
      try {
        const answer = await fetch(live.dataset.live, { credentials: "same-origin", redirect: "error" });
        if (answer.status === 401) { location.reload(); return; }
        if (answer.ok) {
          const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
          if (!live.contains(document.activeElement)) live.replaceChildren(...fresh.body.childNodes);
        }
      } catch { pause = 5000; }
      // A large ledger takes longer to look at; then it is looked at less often.
      pause = Math.max(pause, 10 * (performance.now() - begun));
    }
    setTimeout(refresh, pause);
  };
  setTimeout(refresh, 2000);
}

const followed = document.querySelector("[data-events]");
if (followed) {
  const field = (name) => followed.querySelector(`[data-field="${name}"]`);
  const source = new EventSource(followed.dataset.events);
  source.addEventListener("progress", (event) => {
    const job = JSON.parse(event.data);
    field("state").textContent = job.state;
    field("state").className = `pill ${job.state}`;
    field("progress").value = job.progress;
    field("progress").className = job.state;
    const percent = 100 * job.progress;
    field("share").textContent = `${percent === 0 || percent === 100 ? percent : Math.min(99.9, percent).toFixed(1)} %`;
    for (const name of ["chunks", "contents", "cached", "embedded", "remaining", "dead", "truncated", "tokens"]) {
      field(name).textContent = job[name].toLocaleString("en");
    }
  });
  source.addEventListener("end", () => { source.close(); location.reload(); });
}
