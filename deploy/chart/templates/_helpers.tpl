{{- define "omnivideo.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "omnivideo.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "omnivideo.labels" -}}
{{ include "omnivideo.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* The tags of the worker and mllm images also contain the variant. */}}
{{- define "omnivideo.image" -}}
{{- $tag := .root.Chart.AppVersion -}}
{{- if .of.variant }}{{ $tag = printf "%s-%s" $tag .of.variant }}{{ end -}}
{{- $repository := .of.image.repository -}}
{{- with .root.Values.registry }}{{ $repository = printf "%s/%s" (trimSuffix "/" .) $repository }}{{ end -}}
image: {{ printf "%s:%s" $repository (.of.image.tag | default $tag) | quote }}
imagePullPolicy: {{ .of.image.pullPolicy }}
{{- end }}

{{/* The settings and the secrets that a process uses. compose.yaml gives the same ones to the same processes. */}}
{{- define "omnivideo.uses" -}}
{{- $store := list "OMNIVIDEO_S3" "OMNIVIDEO_S3_BUCKET" "OMNIVIDEO_S3_REGION" -}}
{{- $storeKeys := list "OMNIVIDEO_S3_ACCESS_KEY" "OMNIVIDEO_S3_SECRET_KEY" -}}
{{- $process := list "OMNIVIDEO_HOME" "OMNIVIDEO_PRESET" "OMNIVIDEO_WEIGHTS" "OMNIVIDEO_PRECISION" "OMNIVIDEO_LOG_FORMAT" "OMNIVIDEO_LOG_LEVEL" "OMNIVIDEO_TRACES" -}}
{{- $jobs := list "OMNIVIDEO_HEARTBEAT_TIMEOUT" "OMNIVIDEO_RESUME_TIMEOUT" "OMNIVIDEO_MAX_DEVICE_SECONDS_PER_DAY_PER_KEY" "OMNIVIDEO_MAX_STORED_BYTES_PER_DAY_PER_KEY" -}}
{{- $worker := list "OMNIVIDEO_SAVE_STATE_EVERY_STEPS" "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS" "OMNIVIDEO_MAX_BATCH_SIZE" -}}
{{- if eq .part "api" }}
settings: {{ without (keys .root.Values.settings) "OMNIVIDEO_SAVE_STATE_EVERY_STEPS" "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS" "OMNIVIDEO_MAX_BATCH_SIZE" | toJson }}
secrets: {{ concat (list "OMNIVIDEO_DATABASE" "OMNIVIDEO_BROKER" "OMNIVIDEO_MLLM_KEY" "OMNIVIDEO_ADMIN_KEY") $storeKeys | toJson }}
{{- else if eq .part "worker" }}
settings: {{ concat $process $store $jobs $worker | toJson }}
secrets: {{ concat (list "OMNIVIDEO_DATABASE" "OMNIVIDEO_BROKER") $storeKeys | toJson }}
{{- else if eq .part "sweep" }}
settings: {{ concat $process $store (list "OMNIVIDEO_MLLM" "OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS" "OMNIVIDEO_JOB_LIFETIME_SECONDS" "OMNIVIDEO_THREAD_LIFETIME_SECONDS" "OMNIVIDEO_TURN_LIFETIME_SECONDS") | toJson }}
secrets: {{ concat (list "OMNIVIDEO_DATABASE") $storeKeys | toJson }}
{{- else if eq .part "migrate" }}
settings: {{ $process | toJson }}
secrets: {{ list "OMNIVIDEO_DATABASE" | toJson }}
{{- else }}
settings: {{ $process | toJson }}
secrets: {{ list "OMNIVIDEO_MLLM_KEY" | toJson }}
{{- end }}
{{- end }}

{{/* The entries of the Secret that a process uses, by setting. An empty entry means that the setting is not used. */}}
{{- define "omnivideo.secrets" -}}
{{- $_ := required "secret.name is needed: create a Secret and set its name (see values.yaml)" .root.Values.secret.name -}}
{{- $secrets := dict -}}
{{- range $name := (include "omnivideo.uses" . | fromYaml).secrets }}
{{- with index $.root.Values.secret.keys $name }}{{ $_ := set $secrets $name . }}{{ end -}}
{{- end -}}
{{ $secrets | toJson }}
{{- end }}

{{- define "omnivideo.env" -}}
{{- $root := .root -}}
{{- $mllm := printf "http://%s-mllm:%v" (include "omnivideo.name" $root) $root.Values.mllm.port -}}
{{- $settings := merge (dict) $root.Values.settings -}}
{{- $_ := required "settings.OMNIVIDEO_S3 is needed: set it to http(s)://host:port of the S3 store" $settings.OMNIVIDEO_S3 -}}
{{- if and $root.Values.mllm.enabled (not $settings.OMNIVIDEO_MLLM) }}{{ $_ := set $settings "OMNIVIDEO_MLLM" $mllm }}{{ end -}}
{{- range $name := sortAlpha (include "omnivideo.uses" . | fromYaml).settings }}
{{- with index $settings $name }}
- name: {{ $name }}
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- with $root.Values.tracesEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- range $name, $key := include "omnivideo.secrets" . | fromJson }}
{{- if $root.Values.secret.asFiles }}
- name: {{ $name }}_FILE
  value: /run/secrets/omnivideo/{{ $key }}
{{- else }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $root.Values.secret.name }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- with concat $root.Values.extraEnv (.of.extraEnv | default list) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Pods of a kind are spread over nodes and zones as far as possible. */}}
{{- define "omnivideo.spread" -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "omnivideo.selector" $ | nindent 6 }}
{{- end }}
{{- end }}

{{/* Every pod runs without privileges and without a token, and can write only to /tmp and OMNIVIDEO_HOME. */}}
{{- define "omnivideo.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .of.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- if .of.replicas }}
topologySpreadConstraints: {{- include "omnivideo.spread" . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: {{ .of.temporary }}}
  - name: home
    emptyDir: {sizeLimit: 1Gi}
{{- with .of.shared }}
  - name: shared
    emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- if .root.Values.secret.asFiles }}
  - name: secrets
    secret:
      secretName: {{ .root.Values.secret.name }}
      items:
      {{- range $name, $key := include "omnivideo.secrets" . | fromJson }}
        - {key: {{ $key }}, path: {{ $key }}}
      {{- end }}
{{- end }}
{{- if and .root.Values.weights.claim (has .part (list "worker" "mllm")) }}
  - name: weights
    persistentVolumeClaim: {claimName: {{ .root.Values.weights.claim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "omnivideo.container" -}}
{{ include "omnivideo.image" . }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
env: {{- include "omnivideo.env" . | nindent 2 }}
resources: {{ toYaml .of.resources | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: home, mountPath: {{ .root.Values.settings.OMNIVIDEO_HOME }}}
{{- if .of.shared }}
  - {name: shared, mountPath: /dev/shm}
{{- end }}
{{- if .root.Values.secret.asFiles }}
  - {name: secrets, mountPath: /run/secrets/omnivideo, readOnly: true}
{{- end }}
{{- if and .root.Values.weights.claim (has .part (list "worker" "mllm")) }}
  - {name: weights, mountPath: /weights, readOnly: true}
{{- end }}
{{- end }}

{{/* The options of `omnivideo mllm serve`. All are strings, because a large number would be rendered as 1e+06. */}}
{{- define "omnivideo.mllmOptions" -}}
{{- with .Values.mllm -}}
host: "0.0.0.0"
port: {{ int .port | quote }}
engine: {{ .engine }}
tensor-parallel-size: {{ int .tensorParallel | quote }}
gpu-memory-utilization: {{ .memory | quote }}
cpu-kvcache-gib: {{ int .cache | quote }}
dtype: {{ .dtype }}
max-num-seqs: {{ int .users | quote }}
{{- if .quantization }}
quantization: {{ .quantization | quote }}
{{- end }}
{{- if .lora }}
lora: {{ .lora | quote }}
{{- end }}
{{- if .longest }}
max-model-len: {{ int .longest | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Voluntary disruptions, such as node drains, evict at most one pod of a kind at a time. */}}
{{- define "omnivideo.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "omnivideo.name" .root }}-{{ .part }}
  labels: {{- include "omnivideo.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{- include "omnivideo.selector" . | nindent 6 }}
{{- end }}
