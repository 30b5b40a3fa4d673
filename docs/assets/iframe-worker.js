// Browsers refuse workers to pages that are opened as files. The search worker then runs in a hidden
// iframe, with the same interface.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.waiting = []
      this.inner = frame.contentWindow
      this.inner.postMessage = data => this.deliver(this, data)
      this.inner.importScripts = (...urls) =>
        urls.reduce((before, src) => before.then(() => this.load(src)), Promise.resolve())
      this.load(url).then(() => {
        this.waiting.forEach(data => this.deliver(this.inner, data))
        this.waiting = null
      })
    }
    load(src) {
      return new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script")
        Object.assign(script, { src, onload: resolve, onerror: reject })
        this.inner.document.body.appendChild(script)
      })
    }
    deliver(target, data) {
      const event = new MessageEvent("message", { data })
      target.dispatchEvent(event)
      if (target === this && this.onmessage) this.onmessage(event)
    }
    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.deliver(this.inner, data)
    }
    terminate() {
      this.inner.frameElement.remove()
    }
  }
